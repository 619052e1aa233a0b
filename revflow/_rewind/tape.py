"""The tape: hands the recomputed streams from one block's rewind to the next. Its rules stand at the head of `functions`."""

from __future__ import annotations

from torch import Tensor

from revflow._base.streams import Streams
from revflow._base.torch_private import backward_pass
from revflow._guard.sequences import Evidence, Witness


class Tape:
    """Hands the rebuilt streams from one block's rewind to the next."""

    def __init__(self, witness: Witness | None) -> None:
        self.witness = witness
        self._entries: dict[int, tuple[list[Tensor], Evidence | None, Streams]] = {}

    def push(self, streams: list[Tensor], evidence: Evidence | None, output: Streams = ()) -> None:
        """`output`, the chain's own, is held for the time of the first rewind so that it is not overwritten: where the user has
        dropped it, a copy to the CPU may still be under way on another CUDA stream."""
        self._entries[backward_pass()] = streams, evidence, output

    def pop(self) -> tuple[list[Tensor], Evidence | None, Streams] | None:
        """None if a backward pass begins at this block."""
        return self._entries.pop(backward_pass(), None)

    def begin(self, streams: list[Tensor]) -> tuple[list[Tensor], Evidence | None, Streams]:
        """What `pop` returns after a chain's, or an observed block's, output has been put there."""
        return streams, None if self.witness is None else self.witness.begin(tuple(streams)), ()
