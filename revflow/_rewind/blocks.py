"""One pass through a block, made to be undone: what its forward pass remembers, and how its rewind uses that.

A coupling evaluates each conditioner once in the forward pass and once in the rewind. Any other block is undone by its
`inverse` and run again: three evaluations. No autograd Function is defined here, and no concrete coupling known.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from revflow._base.stepwise import Stepwise
from revflow._base.streams import Gradients, Streams, rotate, versions_of
from revflow._replay.replay import Replay
from revflow._rewind.conditioner import ConditionerStep, RewindInputs
from revflow._rewind.direction import opposite
from revflow._rewind.graph import aliases_of, edges, gradients, leaf, not_leaves, plus
from revflow._rewind.laws import Law
from revflow._rewind.passage import Passage, is_built_in
from revflow._rewind.plain import call_whole, settled, total
from revflow._rewind.slices import SlicedStep
from revflow._rewind.tape import Tape


class BlockCall(ABC):
    """The block at a chain's `position` (its name in the chain), passed once."""

    def __init__(self, passage: Passage, position: str, block: object, before: Any, replays: Sequence[Replay]) -> None:
        self.passage, self.position, self.block_type = passage, position, type(block).__name__
        self.tape: Tape = passage.tape  # type: ignore[assignment]
        self.before = before
        """The autograd node of the block before this one."""
        self.replays = replays
        self.foreign: list[Replay] = []
        """Evaluations of modules that may do more than return a result."""
        self._moving: list[Replay] = []
        """Evaluations that may change a buffer or an attribute."""
        self.parameters: list[Tensor] = []
        """As the modules hold them."""
        self.checked = self.parameters
        """The parameters, for autograd to save: it refuses those that were changed."""
        for replay in replays:
            self.parameters += replay.parameters
            if not replay.is_known:
                self.foreign.append(replay)
            if replay.buffers or not replay.is_known:
                self._moving.append(replay)
        if self.foreign and any([replay.renormalised for replay in self.foreign]):
            self.checked = [p for replay in replays for p in replay.checked]
        self.samples: Streams = ()
        """What the guard keeps of the block's input."""

    @abstractmethod
    def first(self, streams: Streams, leaves: Sequence[Tensor]) -> tuple[Streams, Streams]:
        """The block's output, and what to keep of this pass: anchors or residuals; `leaves` stand for the context's tensors."""

    def moved(self) -> list[Tensor]:
        """Buffers and attributes that this pass has changed, as they were before, for autograd to save."""
        return [value for replay in self._moving for value in replay.moved()] if self._moving else []

    def recall(self, moved: Sequence[Tensor]) -> None:
        """Bring them back."""
        for replay in self._moving:
            moved = replay.recall(moved)

    @abstractmethod
    def rebuilt(self, streams: Streams) -> Streams:
        """Those of the block's input streams that `rewind` works out anew."""

    @abstractmethod
    def rewind(self, now: list[Tensor], given: RewindInputs) -> Gradients:
        """Turn the block's output in `now` into its input; the gradients of its streams, the context's tensors, the parameters.

        The tensors in `now` are the engine's own objects: each is overwritten, or let go, as soon as nothing needs it.
        """


class CouplingCall(BlockCall):
    """A stepwise block: each conditioner runs once in `first` and once in `rewind`."""

    def __init__(self, passage: Passage, position: str, block: Stepwise, before: Any, streams: Streams) -> None:
        law, tape, device = Law(block, passage), passage.tape, streams[0].device
        assert tape is not None
        self._rotations = law.rotations
        conditioners = block.conditioners(streams)[:: passage.direction.sign]
        self._steps: list[ConditionerStep] = [
            ConditionerStep(law, tape, k, conditioner, device)
            if tape.chunks == 1
            else SlicedStep(law, tape, k, conditioner, streams, f"{position}/{k}/slices")
            for k, conditioner in conditioners
        ]
        super().__init__(passage, position, block, before, self._steps)

    def first(self, streams: Streams, leaves: Sequence[Tensor]) -> tuple[Streams, Streams]:
        now = rotate([*streams], self._rotations[0])
        stored: Streams = ()
        log_dets: list[Tensor] = []
        for step in self._steps:
            its_stored, log_det = step.run(now, leaves)
            stored += its_stored
            if log_det is not None:
                log_dets.append(log_det)
        now = rotate(now, self._rotations[1])
        return (*now, total(log_dets)) if log_dets else tuple(now), stored

    def rebuilt(self, streams: Streams) -> Streams:
        now = rotate([*streams], self._rotations[0])
        return tuple([now[step.target] for step in self._steps if not step.law.stores_target])

    def rewind(self, now: list[Tensor], given: RewindInputs) -> Gradients:
        before, after = self._rotations
        count = len(now)  # the log-determinant is no part of what is rebuilt
        now[:], grads = rotate(now, -after), rotate([*given.grads[:count]], -after)
        own_end, stored_end, leaves = len(given.own), len(given.stored), len(given.leaves)
        found: Gradients = ()
        for step in reversed(self._steps):
            # Later steps see what earlier ones changed: whether that wants a gradient is not worth finding out.
            wants = rotate(given.needs[:count], before) if step is self._steps[0] else (True,) * count
            own, stored = own_end - len(step.parameters), stored_end - step.stores
            its_own, its_stored = given.own[own:own_end], given.stored[stored:stored_end]
            its = RewindInputs(given.grads[count:], wants, given.leaves, its_own, its_stored, given.seen)
            more = step.undo(now, grads, its)
            found = [*map(plus, found[:leaves], more), *more[leaves:], *found[leaves:]] if found else more
            own_end, stored_end = own, stored
        now[:] = rotate(now, -before)
        return [*rotate(grads, -before), *found]


class WholeBlockCall(BlockCall):
    """A block known by `forward` and `inverse` alone: undone, then run again; three evaluations a step."""

    def __init__(self, passage: Passage, position: str, block: nn.Module, before: Any, streams: Streams) -> None:
        self._block, self._replay = block, Replay(block, streams[0].device)
        super().__init__(passage, position, block, before, (self._replay,))
        if is_built_in(block):
            self.foreign = []
        self._shapes = [s.shape for s in streams]
        self._strides = [s.stride() for s in streams]

    def first(self, streams: Streams, leaves: Sequence[Tensor]) -> tuple[Streams, Streams]:
        given = streams if self._replay.is_known or is_built_in(self._block) else tuple(aliases_of(streams))
        passage, arguments = self.passage, self.tape.arguments
        context, versions = arguments.filled(aliases_of(leaves)), versions_of(streams)
        reachable = arguments.watch(context)
        outputs = self._replay.first(
            self.tape.draws, call_whole, self._block, passage.direction, passage.log_det, given, context
        )
        outputs = tuple([next((s for s, g in zip(streams, given, strict=True) if g is o), o) for o in outputs])
        if reachable is not None:
            reachable.refuse_changes(self._block)
        if versions_of(streams) != versions:
            raise RuntimeError(f"{passage.direction.name} {_IN_PLACE}")
        return settled(passage, outputs), ()

    def rebuilt(self, streams: Streams) -> Streams:
        return streams

    def rewind(self, now: list[Tensor], given: RewindInputs) -> Gradients:
        if given.seen is not None:
            given.seen.outputs(tuple(now))
        streams = self._undone(tuple(now), given)
        now[:] = [s.detach() for s in streams]
        inputs = tuple(map(leaf, streams, self._strides, given.needs))
        del streams
        followed = None if given.seen is None else given.seen.follow(self._replay)
        entering, leaves = tuple(not_leaves(inputs)), not_leaves(given.leaves)
        with followed or nullcontext():
            again = self._evaluated(entering, leaves, given.own)
        del entering, leaves
        wanted = (*inputs, *given.leaves, *given.own)
        self._show(again, wanted, given)
        ends = edges(again)
        del again
        found = gradients(ends, wanted, given.grads)
        del ends
        if given.seen is not None:
            given.seen.escapes(followed, self._replay)
        return found

    def _undone(self, outputs: Streams, given: RewindInputs) -> Streams:
        """The block's input."""
        back, context = opposite(self.passage.direction), self.tape.arguments.filled(given.leaves)
        versions, place = versions_of(outputs), f"block {self.position}"
        with self._replay.refusing_changes_of_parameters(f"the {back.name} of {place}"):
            streams = self._replay.values(given.own, call_whole, self._block, back, False, outputs, context)
        if versions_of(outputs) != versions:
            raise RuntimeError(f"{place} ({self.block_type}): {back.name} {_IN_PLACE}")
        if [s.shape for s in streams] != self._shapes:
            raise RuntimeError(
                f"{place} ({self.block_type}): {back.name} returned streams of shapes {_shapes(streams)}, to "
                f"undo a pass that was given {_shapes(self._shapes)}"
            )
        return tuple(map(self.passage.arithmetic.round, streams))

    def _evaluated(self, inputs: Streams, leaves: list[Tensor], own: list[Tensor]) -> Streams:
        """The block's output, with a graph; off the grid, since rounding has a derivative of 1."""
        direction, log_det = self.passage.direction, self.passage.log_det
        context = self.tape.arguments.filled(leaves)
        return self._replay.again(own, call_whole, self._block, direction, log_det, inputs, context)

    def _show(self, again: Streams, wanted: Streams, given: RewindInputs) -> None:
        """To the guard: the output, and what it depends on."""
        if given.seen is not None:
            if not is_built_in(self._block):
                given.seen.graph("it", again, wanted, self._block, self.tape.arguments)
            made = again[: len(again) - self.passage.log_det]
            given.seen.outputs_again(tuple(map(self.passage.arithmetic.round, made)))


_IN_PLACE = "changed its input in place, which is still needed: let it return new tensors"


def _shapes(streams: Sequence[Tensor | torch.Size]) -> str:
    return ", ".join(str(tuple(s.shape if isinstance(s, Tensor) else s)) for s in streams)
