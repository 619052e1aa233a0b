"""One pass through a block, made to be undone: what its forward pass remembers, and how its rewind uses that.

A coupling evaluates each conditioner once in the forward pass and once in the rewind. Any other block is undone by its
`inverse` and run again: three evaluations. No autograd Function is defined here, and no concrete coupling known.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from revflow._passage import (
    Context,
    Gradients,
    Passage,
    Stepwise,
    Streams,
    changed,
    log_det_of,
    rotate,
    run_whole,
    total,
)
from revflow._replay import Replay
from revflow.exact import Residual

if TYPE_CHECKING:
    from revflow._guard import Seen


S = TypeVar("S", list[Tensor], Streams)


class Given(NamedTuple):
    """What a rewind is given, beside the block's output."""

    grads: Gradients
    """Of the output's streams, and of the log-determinant if there is one."""
    needs: Sequence[bool]
    """Which of the input's streams want a gradient."""
    leaves: list[Tensor]
    """They stand for the context's tensors."""
    own: list[Tensor]
    """The parameters."""
    kept: Streams
    """What `first` wished to keep."""
    seen: Seen | None
    """The guard's, to be told of outputs whose input is an anchor."""


class Call(ABC):
    """The block at a chain's `position` (its name in the chain), passed once."""

    __slots__ = ("before", "block_type", "parameters", "passage", "position", "replays", "samples")

    def __init__(self, passage: Passage, position: str, block: nn.Module, before: Any) -> None:
        self.passage, self.position, self.block_type = passage, position, type(block).__name__
        self.before = before
        """The autograd node of the block before this one."""
        self.replays: Sequence[Replay] = ()
        self.parameters: list[Tensor] = []
        self.samples: Streams = ()
        """What the guard keeps of the block's input."""

    @abstractmethod
    def first(self, streams: Streams, context: Context) -> tuple[Streams, Streams]:
        """The block's output, and what to keep of this pass: anchors or residuals."""

    @abstractmethod
    def rebuilt(self, streams: Streams) -> Streams:
        """Those of the block's input streams that `rewind` works out anew."""

    @abstractmethod
    def rewind(self, outputs: Streams, given: Given) -> tuple[Streams, list[Tensor | None]]:
        """The block's input, and the gradients of its streams, of the context's tensors and of the parameters."""


class Coupled(Call):
    """A stepwise block: each conditioner runs once in `first` and once in `rewind`."""

    __slots__ = ("_rotations", "_steps")

    def __init__(self, passage: Passage, position: str, block: Stepwise, before: Any, streams: Streams) -> None:
        super().__init__(passage, position, block, before)  # type: ignore[arg-type]
        inverse, device = passage.inverse, streams[0].device
        self._rotations = (-block.rotation, 0) if inverse else (0, block.rotation)
        self._steps = [_Step(block, passage, k, conditioner, device) for k, conditioner in block.conditioners(streams)]
        if inverse:
            self._steps.reverse()
        self.replays = self._steps
        for step in self._steps:
            self.parameters += step.parameters

    def first(self, streams: Streams, context: Context) -> tuple[Streams, Streams]:
        now = rotate([*streams], self._rotations[0])
        kept: Streams = ()
        log_dets: list[Tensor] = []
        for step in self._steps:
            x = now[step.target]
            t = step.run(self.passage, now, context)
            if step.keeps:
                kept += step.keep(x, now[step.target], t)
            if self.passage.log_det:
                log_dets.append(step.log_det(t))
        now = rotate(now, self._rotations[1])
        return (*now, total(log_dets)) if log_dets else tuple(now), kept

    def rebuilt(self, streams: Streams) -> Streams:
        now = rotate([*streams], self._rotations[0])
        return tuple([now[step.target] for step in self._steps if not step.keeps_target])

    def rewind(self, outputs: Streams, given: Given) -> tuple[Streams, list[Tensor | None]]:
        before, after = self._rotations
        count = len(outputs)  # the log-determinant is no part of what is rebuilt
        now, grads = rotate([*outputs], -after), rotate([*given.grads[:count]], -after)
        own, kept = given.own, given.kept
        leaf_grads: list[Tensor | None] = [None] * len(given.leaves)
        own_grads: list[Tensor | None] = []
        for i in range(len(self._steps) - 1, -1, -1):
            step = self._steps[i]
            # Later steps see what earlier ones changed: whether that wants a gradient is not worth finding out.
            wants = [True] * count if i else rotate([*given.needs[:count]], before)
            own, its_own = _parted(own, len(step.parameters))
            kept, its_kept = _parted(kept, step.keeps)
            its = Given(given.grads[count:], wants, given.leaves, its_own, its_kept, given.seen)
            found = step.undo(now, grads, self.passage.arguments.filled(given.leaves), its)
            leaf_grads = [*map(_sum, leaf_grads, found)]
            own_grads[:0] = found[len(leaf_grads) :]
        return tuple(rotate(now, -before)), rotate(grads, -before) + leaf_grads + own_grads


class _Step(Replay):
    """One conditioner of a stepwise block, and the stream that it overwrites."""

    __slots__ = ("_block", "_conditioner", "_grid", "_inverse", "_layout", "keeps", "keeps_target", "target")

    def __init__(
        self, block: Stepwise, passage: Passage, target: int, conditioner: nn.Module, device: torch.device
    ) -> None:
        super().__init__(conditioner, device)
        self.target = target
        self._block, self._conditioner = block, conditioner
        self._inverse, self._grid = passage.inverse, passage.grid
        self.keeps_target = self._grid is None and block.ill_conditioned and not self._inverse
        self.keeps = 1 if self.keeps_target else 0 if self._grid is None or block.translates else len(Residual._fields)
        """How many tensors it keeps: its target as an anchor, a residual, or nothing."""
        self._layout: list[tuple[int, ...]] = []
        """The strides of all streams; the target's as they are after the step."""

    def run(self, passage: Passage, now: list[Tensor], context: Context) -> Streams:
        """Overwrite the target in `now`; returns the coefficients."""
        k, block = self.target, self._block
        others = now[:k] + now[k + 1 :]
        versions = [s._version for s in others]
        t = self.first(passage.draws, block.evaluate, self._conditioner, now[k], others, context)
        if [s._version for s in others] != versions:
            raise RuntimeError(
                f"the conditioner {type(self._conditioner).__name__} changed its input in place (by a first layer with "
                f"inplace=True, say), which cannot be undone; let it work on a copy"
            )
        now[k] = changed(block, self._inverse, self._grid, now[k], t)
        self._layout = [s.stride() for s in now]
        if passage.extent is not None:
            passage.extent.see(now[k])
        return t

    def keep(self, x: Tensor, y: Tensor, t: Streams) -> Streams:
        """What `undo` will need beside the step's output y, to find its target x."""
        return (x,) if self._grid is None else self._grid.residual(x, self._estimate(y, t))

    def undo(self, now: list[Tensor], grads: list[Tensor | None], context: Context, given: Given) -> Gradients:
        """Bring the streams in `now`, and their gradients in `grads`, from after the step to before it.

        In `given` are this step's own parameters and what it kept, and of the gradients the log-determinant's alone. Returns
        the gradients of its leaves and parameters.
        """
        k, block = self.target, self._block
        y, y_grad = now[k], grads[k]
        others = [*range(k), *range(k + 1, len(now))]
        inputs = [leaf(now[j], self._layout[j], given.needs[j]) for j in others]
        wanted = (*inputs, *given.leaves, *given.own)
        t = self.again(given.own, block.evaluate, self._conditioner, y, inputs, context)
        if given.seen is not None:
            given.seen.graph(k, t, wanted)
        now[k] = x = self._before(y, t, given.kept)
        # The other streams are outputs too: so autograd adds the gradients that each gets on both ways, and in the same order
        # as without an engine.
        other_grads = [grads[j] for j in others]
        if block.translates:
            if self._inverse and y_grad is not None:
                y_grad = -y_grad
            found = gradients((*t, *inputs), wanted, (y_grad, *other_grads))
        else:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                again: Streams = ((block.separate if self._inverse else block.combine)(x, *t),)
                if given.grads:
                    again = (*again, self.log_det(t))
            if self.keeps_target and given.seen is not None:
                given.seen.output(y, again[0])
            grads[k], *found = gradients((*again, *inputs), (x, *wanted), (y_grad, *given.grads, *other_grads))
        for i, j in enumerate(others):
            grads[j] = found[i]
        return found[len(others) :]

    def _before(self, y: Tensor, t: Streams, kept: Streams) -> Tensor:
        """The target before the step, from the step's output; gradients are off here."""
        if self.keeps_target:
            return kept[0]
        if not self.keeps:
            return self._estimate(y, t)
        assert self._grid is not None
        estimate = self._estimate(_laid_out(y, self._layout[self.target]), t)
        return self._grid.restore(estimate, Residual(*kept))

    def _estimate(self, y: Tensor, t: Streams) -> Tensor:
        """The target before the step, as far as the step's output and its coefficients tell; on a grid, if it adds, exact."""
        return changed(self._block, not self._inverse, self._grid, y, t)

    def log_det(self, t: Streams) -> Tensor:
        return log_det_of(self._block, self._inverse, t)


class Whole(Call):
    """A block known by `forward` and `inverse` alone: undone, then run again; three evaluations a step."""

    def __init__(self, passage: Passage, position: str, block: nn.Module, before: Any, streams: Streams) -> None:
        super().__init__(passage, position, block, before)
        self._block, self._replay = block, Replay(block, streams[0].device)
        self.replays, self.parameters = (self._replay,), self._replay.parameters
        self._shapes = [s.shape for s in streams]
        self._strides = [s.stride() for s in streams]

    def first(self, streams: Streams, context: Context) -> tuple[Streams, Streams]:
        return self._replay.first(self.passage.draws, run_whole, self._block, self.passage, streams, context), ()

    def rebuilt(self, streams: Streams) -> Streams:
        return streams

    def rewind(self, outputs: Streams, given: Given) -> tuple[Streams, list[Tensor | None]]:
        passage, own = self.passage, given.own
        context, undo = passage.arguments.filled(given.leaves), torch.no_grad()(run_whole)
        backwards = passage._replace(inverse=not passage.inverse, log_det=False, extent=None)
        streams = self._replay.again(own, undo, self._block, backwards, outputs, context)
        if [s.shape for s in streams] != self._shapes:
            raise RuntimeError(
                f"block {self.position} ({self.block_type}): {'forward' if passage.inverse else 'inverse'} returned streams of "
                f"shapes {_shapes(streams)}, to undo a pass that was given {_shapes(self._shapes)}"
            )
        inputs = tuple(map(leaf, streams, self._strides, given.needs))
        wanted = (*inputs, *given.leaves, *own)
        # Off the grid: rounding has a derivative of 1.
        again = self._replay.again(own, run_whole, self._block, passage._replace(grid=None), inputs, context)
        if given.seen is not None:
            given.seen.graph(0, again, wanted)
        return streams, [*gradients(again, wanted, given.grads)]


def _shapes(streams: Sequence[Tensor | torch.Size]) -> str:
    return ", ".join(str(tuple(s.shape if isinstance(s, Tensor) else s)) for s in streams)


def _parted(items: S, count: int) -> tuple[S, S]:
    """All but the last `count`, and those."""
    return items[: len(items) - count], items[len(items) - count :]


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def leaf(tensor: Tensor, strides: tuple[int, ...], needs_grad: bool) -> Tensor:
    """A leaf of a new graph, of the tensor's values, with the strides of the first run."""
    return _laid_out(tensor, strides).detach().requires_grad_(needs_grad)


def _laid_out(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The tensor with these strides (rule 5 of _rewind)."""
    if tensor.stride() == strides:
        return tensor
    laid = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
    own = tuple([slice(None if stride else 1) for stride in strides])  # an expanded dimension holds one value
    laid[own].copy_(tensor[own])
    return laid


def gradients(outputs: Streams, inputs: Streams, grads: Gradients) -> Gradients:
    """The gradients of `inputs`; None for those that want none or that the outputs do not depend on.

    This is torch.autograd.grad without its checks of the arguments, which for small conditioners take as long as it does.
    """
    wanted = tuple([i for i in inputs if i.requires_grad])
    if any([g is None for g in grads]) or not all([o.requires_grad for o in outputs]):
        known = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
        outputs, grads = tuple([o for o, _ in known]), [g for _, g in known]
    if not outputs or not wanted:
        return (None,) * len(inputs)
    found: Gradients = torch.autograd.Variable._execution_engine.run_backward(
        outputs,
        tuple(grads),
        False,  # retain_graph
        False,  # create_graph
        wanted,
        allow_unreachable=True,
        accumulate_grad=False,
    )
    if len(wanted) == len(inputs):
        return found
    rest = iter(found)
    return [next(rest) if i.requires_grad else None for i in inputs]
