"""A block that is not a coupling: the engine inverts it as a whole, by its `inverse`, and then evaluates it again.

Such a block is evaluated three times per training step, a coupling's conditioner twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from revflow._base.streams import Context, Gradients, Streams, versions_of
from revflow._replay.replay import Replay
from revflow._rewind.direction import FORWARD, INVERSE
from revflow._rewind.graph import aliases_of, edges, gradients, leaf, not_leaves
from revflow._rewind.passage import Passage, RewindInputs, is_built_in
from revflow._rewind.plain import call_whole, settled
from revflow._rewind.tape import Tape


class WholeCall(Replay):
    """Such a block in one call: its evaluation in both passes, and its inversion."""

    stores = 0

    def __init__(self, passage: Passage, tape: Tape, block: nn.Module, place: str, streams: Streams) -> None:
        super().__init__(block, streams[0].device)
        self._passage, self._tape, self._block, self._place = passage, tape, block, place
        self._is_built_in = is_built_in(block)
        self.is_foreign = not (self.is_known or self._is_built_in)
        self._shapes, self._strides = [s.shape for s in streams], [s.stride() for s in streams]

    def run(self, now: list[Tensor], leaves: Sequence[Tensor]) -> tuple[Streams, Tensor | None]:
        passage, arguments, streams = self._passage, self._tape.arguments, tuple(now)
        given = tuple(aliases_of(streams)) if self.is_foreign else streams
        context, versions = arguments.filled(aliases_of(leaves)), versions_of(streams)
        reachable = arguments.watch(context)
        outputs = self.first(
            self._tape.draws, call_whole, self._block, passage.direction, passage.log_det, given, context
        )
        # If the block returns an input unchanged, the output is that stream itself, not its alias.
        outputs = tuple([next((s for s, g in zip(streams, given, strict=True) if g is o), o) for o in outputs])
        if reachable is not None:
            reachable.refuse_changes(self._block)
        if versions_of(streams) != versions:
            raise RuntimeError(f"{passage.direction.name} {_IN_PLACE}")
        now[:] = settled(passage, outputs)
        return (), now.pop() if passage.log_det else None

    def undo(self, now: list[Tensor], grads: list[Tensor | None], given: RewindInputs) -> Gradients:
        seen = given.seen
        if seen is not None:
            seen.outputs(tuple(now))
        now[:] = self._inverted(tuple(now), self._tape.arguments.filled(given.leaves), given.own)
        inputs = [*map(leaf, now, self._strides, given.needs)]
        followed = None if seen is None else seen.follow(self)
        again = self._evaluated(inputs, given, followed or nullcontext())
        wanted = (*inputs, *given.leaves, *given.own)
        if seen is not None:
            if not self._is_built_in:
                seen.graph("it", again, wanted, self._block, self._tape.arguments)
            count = len(again) - self._passage.log_det
            seen.outputs_again(tuple(map(self._passage.arithmetic.round, again[:count])))
        ends = edges(again)
        del again
        found = gradients(ends, wanted, (*grads, *given.grads))
        del ends
        if seen is not None:
            seen.escapes(followed, self)
        grads[:] = found[: len(inputs)]
        return found[len(inputs) :]

    def _evaluated(
        self, inputs: list[Tensor], given: RewindInputs, context: AbstractContextManager[Any, Any]
    ) -> Streams:
        """The block's output, with a graph. In exact arithmetic it is not rounded, since rounding has a derivative of 1."""
        direction, log_det = self._passage.direction, self._passage.log_det
        streams, arguments = tuple(not_leaves(inputs)), self._tape.arguments.filled(not_leaves(given.leaves))
        with context:
            return self.again(given.own, call_whole, self._block, direction, log_det, streams, arguments)

    def _inverted(self, outputs: Streams, context: Context, own: list[Tensor]) -> Streams:
        """The block's input."""
        back, versions = INVERSE if self._passage.direction is FORWARD else FORWARD, versions_of(outputs)
        with self.refusing_changes_of_parameters(f"the {back.name} of {self._place}"):
            streams = self.values(own, call_whole, self._block, back, False, outputs, context)
        place = f"{self._place} ({type(self._block).__name__})"
        if versions_of(outputs) != versions:
            raise RuntimeError(f"{place}: {back.name} {_IN_PLACE}")
        if [s.shape for s in streams] != self._shapes:
            raise RuntimeError(
                f"{place}: {back.name} returned streams of shapes {_text([s.shape for s in streams])}, to invert a pass that was "
                f"given {_text(self._shapes)}"
            )
        return tuple([self._passage.arithmetic.round(s.detach()) for s in streams])


_IN_PLACE = "changed its input in place, which is still needed: let it return new tensors"


def _text(shapes: Sequence[torch.Size]) -> str:
    return ", ".join(str(tuple(shape)) for shape in shapes)
