"""One pass through a block whose input is recomputed: the state of the forward pass, and the inversion that uses it.

A block has parts: a coupling one for each conditioner, any other block a single one. No autograd Function is
defined here, and no concrete coupling is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from revflow._base.stepwise import Stepwise
from revflow._base.streams import Gradients, Streams, rotate
from revflow._replay.replay import Replay
from revflow._rewind.conditioner import ConditionerCall
from revflow._rewind.graph import plus
from revflow._rewind.laws import Law
from revflow._rewind.passage import Passage, RewindInputs
from revflow._rewind.plain import total
from revflow._rewind.slices import SlicedCall
from revflow._rewind.tape import Tape
from revflow._rewind.whole import WholeCall


class BlockCall:
    """One pass through the block at a `position` of a sequence (its name in there), inverted in the backward pass."""

    def __init__(
        self,
        passage: Passage,
        position: str,
        block: nn.Module | Stepwise,
        law: Law | None,
        before: Any,
        streams: Streams,
    ) -> None:
        """`law` is that of a coupling, None of any other block; `before` is the autograd node of the block before this one."""
        self.passage, self.position, self.before, self._law = passage, position, before, law
        self.tape: Tape = passage.tape  # type: ignore[assignment]
        self.block_type = type(block).__name__
        self._rotations, self._width = (0, 0) if law is None else law.rotations, len(streams)
        self.replays = _parts(passage, position, block, law, streams)
        """Its parts."""
        self.foreign: list[Replay] = []
        """Parts whose modules may do more than return a result."""
        self._moving: list[ConditionerCall | WholeCall] = []
        """Parts that may change a buffer or an attribute."""
        self.parameters: list[Tensor] = []
        """As the modules hold them."""
        self.checked = self.parameters
        """The parameters, for autograd to save: it refuses those that were changed."""
        for part in self.replays:
            self.parameters += part.parameters
            if part.is_foreign:
                self.foreign.append(part)
            if part.buffers or not part.is_known:
                self._moving.append(part)
        if self.foreign and any([part.renormalized for part in self.foreign]):
            self.checked = [p for part in self.replays for p in part.checked]
        self.samples: Streams = ()
        """Values of the block's input that the guard stored."""

    def first(self, streams: Streams, leaves: Sequence[Tensor]) -> tuple[Streams, Streams]:
        """The block's output, and the streams or residuals to store; `leaves` are the tensors among the keyword arguments."""
        before, after = self._rotations
        now = rotate([*streams], before)
        stored: Streams = ()
        log_dets: list[Tensor] = []
        for part in self.replays:
            its_stored, log_det = part.run(now, leaves)
            stored += its_stored
            if log_det is not None:
                log_dets.append(log_det)
        now = rotate(now, after)
        return (*now, total(log_dets, now[0])) if log_dets else tuple(now), stored

    def moved(self) -> list[Tensor]:
        """Buffers and attributes that this pass has changed, as they were before, for autograd to save."""
        return [value for part in self._moving for value in part.moved()] if self._moving else []

    def recall(self, moved: Sequence[Tensor]) -> None:
        """Bring them back."""
        for part in self._moving:
            moved = part.recall(moved)

    def recomputed(self, streams: Streams) -> Streams:
        """Those of the block's input streams that `rewind` recomputes; the others were stored."""
        law = self._law
        if law is None:
            return streams
        if law.stores_target:
            return ()
        return tuple([streams[(part.target + law.rotations[0]) % len(streams)] for part in self.replays])  # type: ignore[union-attr]

    def rewind(self, now: list[Tensor], given: RewindInputs) -> Gradients:
        """Turn the block's output in `now` into its input.

        Returns the gradients of its streams, of the tensors among the keyword arguments, and of the parameters. The tensors in
        `now` are the engine's own objects: each is overwritten, or freed, as soon as nothing needs it.
        """
        before, after = self._rotations
        count = len(now)  # the log-determinant is not recomputed
        grads = [*given.grads[:count]]
        if after:
            now[:], grads = rotate(now, -after), rotate(grads, -after)
        own_end, stored_end, leaves = len(given.own), len(given.stored), len(given.leaves)
        found: Gradients = ()
        for part in reversed(self.replays):
            # The input of a later part depends on earlier ones. Finding out whether it needs a gradient does not pay.
            needs = rotate(given.needs[: self._width], before) if part is self.replays[0] else (True,) * count
            own, stored = own_end - len(part.parameters), stored_end - part.stores
            its_own, its_stored = given.own[own:own_end], given.stored[stored:stored_end]
            its = RewindInputs(given.grads[count:], needs, given.leaves, its_own, its_stored, given.seen)
            more = part.undo(now, grads, its)
            found = [*map(plus, found[:leaves], more), *more[leaves:], *found[leaves:]] if found else more
            own_end, stored_end = own, stored
        if before:
            now[:], grads = rotate(now, -before), rotate(grads, -before)
        return [*grads, *found]


def _parts(
    passage: Passage, position: str, block: nn.Module | Stepwise, law: Law | None, streams: Streams
) -> Sequence[ConditionerCall | WholeCall]:
    """The parts of a block, in the order in which they run."""
    tape, device = passage.tape, streams[0].device
    assert tape is not None
    if law is None:
        assert isinstance(block, nn.Module)
        return [WholeCall(passage, tape, block, f"block {position}", streams)]
    conditioners = law.block.conditioners(streams)[:: law.direction.sign]
    if tape.chunks == 1:
        return [ConditionerCall(law, tape, k, conditioner, device) for k, conditioner in conditioners]
    return [SlicedCall(law, tape, k, conditioner, streams, f"{position}/{k}/slices") for k, conditioner in conditioners]
