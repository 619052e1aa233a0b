"""The tape of one forward call. Its rules are at the top of `functions`."""

from __future__ import annotations

from torch import Tensor

from revflow._base.streams import Context, Streams
from revflow._base.torch_private import backward_pass
from revflow._budget.meter import Meter
from revflow._guard.sequences import Evidence, Witness
from revflow._replay.arguments import Arguments
from revflow._replay.random_states import Draws

Entry = tuple[list[Tensor], Evidence | None, Streams]
"""A block's output, the guard's evidence of the backward pass so far, and streams that must not be freed yet."""


class Tape:
    """Shared by the blocks of one call whose inputs are recomputed; hands recomputed streams from one block to the next.

    Args:
        context: the keyword arguments of the call.
        chunks: the number of micro-batches in which each conditioner is evaluated.
        witness: the guard's observer of the call; None if the guard is off.
    """

    def __init__(self, context: Context, chunks: int = 1, witness: Witness | None = None) -> None:
        self.arguments, self.draws = Arguments(context), Draws()
        self.chunks, self.witness = chunks, witness
        self.keeps_outputs = False
        """Whether the block that runs next stores the outputs of its conditioners."""
        self.meter: Meter | None = None
        """Measures the forward pass; None if its costs are known, or not needed."""
        self._entries: dict[int, Entry] = {}

    def begin(self, streams: list[Tensor], output: Streams = ()) -> Entry:
        """The entry with which a backward pass begins at these streams.

        `output` is the sequence's own output. Holding it prevents the first inversion from overwriting it: if the user has
        dropped it, a copy to the CPU may still be in progress on another CUDA stream.
        """
        return streams, None if self.witness is None else self.witness.begin(tuple(streams)), output

    def push(self, entry: Entry) -> None:
        """Leave it for the block before, in the running backward pass."""
        self._entries[backward_pass()] = entry

    def pop(self) -> Entry | None:
        """The entry of the running backward pass; None if that begins at this block."""
        return self._entries.pop(backward_pass(), None)
