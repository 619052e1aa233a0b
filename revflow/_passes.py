"""One pass through a block, made to be undone: what its forward pass remembers, and how its rewind uses that.

A stepwise block (a coupling) is taken apart into steps: each conditioner is evaluated once in the forward pass and once in
the rewind. Any other block is undone by its `inverse` and run again: three evaluations. No autograd Function is defined
here, and no concrete coupling known.

Where the log-determinant is asked for, one value a sample follows a block's streams, and its gradient theirs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from revflow._replay import Draws, Replay
from revflow.exact import Extent, Grid, Residual

if TYPE_CHECKING:
    from revflow._guard import Seen
    from revflow._rewind import Tape

T = TypeVar("T")
Streams = tuple[Tensor, ...]
Context = dict[str, Any]
Gradients = Sequence[Tensor | None]


class Stepwise(ABC):
    """A block that the engine takes apart, so that each conditioner runs exactly twice a training step.

    Forward: for each conditioner, its target stream is overwritten by `combine(target, *t)`, an elementwise map whose
    coefficients t the conditioner computes from the other streams; then the streams are rotated to the left by `rotation`.
    Inverse: rotated back, then the targets are overwritten by `separate(target, *t)`, in reverse order.
    """

    rotation: int
    combine: Callable[..., Tensor]
    separate: Callable[..., Tensor]
    log_derivative: Callable[..., Tensor]
    """t -> log |d combine / d target|, elementwise."""
    ill_conditioned: ClassVar[bool]
    """Whether `separate` loses digits: the overwritten stream is then kept as an anchor instead of rebuilt."""

    @property
    @abstractmethod
    def translates(self) -> bool:
        """Whether `combine` adds its only coefficient and `separate` subtracts it: their gradients then need no graph."""

    @property
    @abstractmethod
    def unobserved(self) -> bool:
        """Whether nothing but the engine would run if the block were called: no hooks, no `forward` of a subclass."""

    @abstractmethod
    def conditioners(self, streams: Streams) -> list[tuple[int, nn.Module]]:
        """(target, conditioner), in the order in which the forward runs them; ValueError if it cannot take these streams."""

    @abstractmethod
    def evaluate(self, conditioner: nn.Module, target: Tensor, others: Sequence[Tensor], context: Context) -> Streams:
        """The coefficients t for a stream of `target`'s shape and dtype."""


class Arguments:
    """The keyword arguments of a chain's call: the tensors among them, in any tree of lists and dictionaries, and the rest."""

    def __init__(self, context: Context) -> None:
        self.tensors: Streams = ()
        self._spec: pytree.TreeSpec | None = None
        if context:
            self._leaves, self._spec = pytree.tree_flatten(context)
            self._positions = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
            self.tensors = tuple(self._leaves[i] for i in self._positions)
            for i in self._positions:
                self._leaves[i] = None

    def filled(self, tensors: Sequence[Tensor]) -> Context:
        """The keyword arguments, with `tensors` in the place of theirs."""
        if self._spec is None:
            return {}
        leaves = list(self._leaves)
        for i, tensor in zip(self._positions, tensors, strict=True):
            leaves[i] = tensor
        context: Context = pytree.tree_unflatten(leaves, self._spec)
        return context


class Passage(NamedTuple):
    """One call of a chain: what is the same for all of its blocks."""

    inverse: bool
    log_det: bool
    """Whether each block's log-determinant is wanted, behind its streams."""
    arguments: Arguments
    draws: Draws
    tape: Tape | None = None
    """None under ordinary autograd."""
    grid: Grid | None = None
    """Where the streams live in exact arithmetic; the same under ordinary autograd."""
    extent: Extent | None = None
    """Sees that they stay within the grid's range."""
    residuals: list[Residual] | None = None
    """Without a tape: filled by a forward pass, last step last, and used up by an inverse one; None if not wanted."""


def run_plainly(block: Stepwise, passage: Passage, streams: Streams, context: Context) -> Streams:
    """The block's output under ordinary autograd."""
    inverse, log_det, grid, residuals = passage.inverse, passage.log_det, passage.grid, passage.residuals
    now = _rotate([*streams], -block.rotation if inverse else 0)
    log_dets: list[Tensor] = []
    conditioners = block.conditioners(streams)
    for k, conditioner in reversed(conditioners) if inverse else conditioners:
        t = block.evaluate(conditioner, now[k], now[:k] + now[k + 1 :], context)
        x = now[k]
        now[k] = _changed(block, inverse, grid, x, t)
        if grid is not None and residuals is not None and not block.translates:
            if inverse:
                now[k] = grid.restore(now[k], residuals.pop())
            else:
                with torch.no_grad():
                    residuals.append(grid.residual(x, _changed(block, True, grid, now[k], t)))
        if passage.extent is not None:
            passage.extent.see(now[k])
        if log_det:
            log_dets.append(_log_det(block, inverse, t))
    now = _rotate(now, 0 if inverse else block.rotation)
    return (*now, _total(log_dets)) if log_det else tuple(now)


def _changed(block: Stepwise, inverse: bool, grid: Grid | None, x: Tensor, t: Streams) -> Tensor:
    """The stream that a step makes of its target x."""
    if grid is None:
        return (block.separate if inverse else block.combine)(x, *t)
    if block.translates:
        return (grid.take_back if inverse else grid.add)(x, *t)
    return grid.round((block.separate if inverse else block.combine)(x, *t))


def run_whole(block: nn.Module, passage: Passage, streams: Streams, context: Context) -> Streams:
    """As `run_plainly`, for a block known by `forward` and `inverse` alone."""
    outputs = _call_whole(block, passage.inverse, passage.log_det, streams, context)
    if passage.grid is None:
        return outputs
    count = len(outputs) - passage.log_det
    rounded = tuple([passage.grid.round(s) for s in outputs[:count]])
    if passage.extent is not None:
        for stream in rounded:
            passage.extent.see(stream)
    return rounded + outputs[count:]


def _call_whole(block: nn.Module, inverse: bool, log_det: bool, streams: Streams, context: Context) -> Streams:
    """Its streams, and its log-determinant if wanted."""
    call: Callable[..., object] = block.inverse if inverse else block  # type: ignore[assignment]
    outputs = as_streams(call(*streams, **context))
    if not log_det:
        return outputs
    of: Callable[..., Tensor] | None = getattr(block, "log_det", None)
    if of is None:
        raise NotImplementedError(f"a {type(block).__name__} has no log-determinant: write its method log_det")
    value = -of(*outputs, **context) if inverse else of(*streams, **context)
    if value.shape != streams[0].shape[:1]:
        raise ValueError(
            f"log_det has to return one value a sample; it returned a tensor of shape {tuple(value.shape)}"
        )
    return (*outputs, value)


def as_streams(value: object) -> Streams:
    """A block's result, checked to be a tuple of tensors."""
    if isinstance(value, tuple) and value and all([isinstance(s, Tensor) for s in value]):
        return value
    raise TypeError(f"a block has to return a tuple of tensors, one a stream; this one returned {_described(value)}")


def _described(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


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
    def rewind(
        self,
        outputs: Streams,
        grads: Gradients,
        needs: Sequence[bool],
        leaves: list[Tensor],
        own: list[Tensor],
        kept: Streams,
        seen: Seen | None,
    ) -> tuple[Streams, list[Tensor | None]]:
        """The block's input, and the gradients of its streams, of the context's tensors and of the parameters.

        `needs` says which streams want a gradient; `leaves` stand for the context's tensors, `own` for the parameters.
        `kept` is what `first` wished to keep; `seen` the guard's, to be told of outputs whose input is an anchor.
        """


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
        now = _rotate([*streams], self._rotations[0])
        kept: Streams = ()
        log_dets: list[Tensor] = []
        for step in self._steps:
            x = now[step.target]
            t = step.run(self.passage, now, context)
            if step.keeps:
                kept += step.keep(x, now[step.target], t)
            if self.passage.log_det:
                log_dets.append(step.log_det(t))
        now = _rotate(now, self._rotations[1])
        return (*now, _total(log_dets)) if log_dets else tuple(now), kept

    def rebuilt(self, streams: Streams) -> Streams:
        now = _rotate([*streams], self._rotations[0])
        return tuple([now[step.target] for step in self._steps if not step.keeps_target])

    def rewind(
        self,
        outputs: Streams,
        grads: Gradients,
        needs: Sequence[bool],
        leaves: list[Tensor],
        own: list[Tensor],
        kept: Streams,
        seen: Seen | None,
    ) -> tuple[Streams, list[Tensor | None]]:
        before, after = self._rotations
        count = len(outputs)  # the log-determinant is no part of what is rebuilt
        now, now_grads = _rotate([*outputs], -after), _rotate([*grads[:count]], -after)
        context = self.passage.arguments.filled(leaves)
        leaf_grads: list[Tensor | None] = [None] * len(leaves)
        own_grads: list[Tensor | None] = []
        end = len(own)
        for i in range(len(self._steps) - 1, -1, -1):
            step = self._steps[i]
            begin = end - len(step.parameters)
            # Later steps see what earlier ones changed: whether that wants a gradient is not worth finding out.
            wants = [True] * count if i else _rotate([*needs[:count]], before)
            its_own = kept[len(kept) - step.keeps :]
            kept = kept[: len(kept) - step.keeps]
            found = step.undo(now, now_grads, grads[count:], wants, context, leaves, own[begin:end], its_own, seen)
            for j in range(len(leaves)):
                leaf_grads[j] = _sum(leaf_grads[j], found[j])
            own_grads[:0] = found[len(leaves) :]
            end = begin
        return tuple(_rotate(now, -before)), _rotate(now_grads, -before) + leaf_grads + own_grads


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
        now[k] = _changed(block, self._inverse, self._grid, now[k], t)
        self._layout = [s.stride() for s in now]
        if passage.extent is not None:
            passage.extent.see(now[k])
        return t

    def keep(self, x: Tensor, y: Tensor, t: Streams) -> Streams:
        """What `undo` will need beside the step's output y, to find its target x."""
        return (x,) if self._grid is None else self._grid.residual(x, self._estimate(y, t))

    def undo(
        self,
        now: list[Tensor],
        grads: list[Tensor | None],
        log_det_grad: Gradients,
        wants: list[bool],
        context: Context,
        leaves: list[Tensor],
        own: list[Tensor],
        kept: Streams,
        seen: Seen | None,
    ) -> Gradients:
        """Bring the streams in `now`, and their gradients in `grads`, from after the step to before it.

        Returns the gradients of `leaves` and `own`.
        """
        k, block = self.target, self._block
        y, y_grad = now[k], grads[k]
        others = [*range(k), *range(k + 1, len(now))]
        inputs = [_leaf(now[j], self._layout[j], wants[j]) for j in others]
        t = self.again(own, block.evaluate, self._conditioner, y, inputs, context)
        if seen is not None:
            seen.graph(k, t, (*inputs, *leaves, *own))
        now[k] = x = self._target(y, t, kept)
        # Each of the other streams is an output too: so autograd adds the gradients that it gets on both ways, in the order
        # of ordinary autograd.
        roots, root_grads = (*t, *inputs), (y_grad, *[grads[j] for j in others])
        if block.translates:
            if self._inverse and y_grad is not None:
                root_grads = (-y_grad, *root_grads[1:])
            found = _gradients(roots, (*inputs, *leaves, *own), root_grads)
        else:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                again = (block.separate if self._inverse else block.combine)(x, *t)
                roots = (again, *([self.log_det(t)] if log_det_grad else []), *inputs)
            if self.keeps_target and seen is not None:
                seen.output(y, again)
            root_grads = (y_grad, *log_det_grad, *root_grads[1:])
            grads[k], *found = _gradients(roots, (x, *inputs, *leaves, *own), root_grads)
        for j, grad in zip(others, found, strict=False):
            grads[j] = grad
        return found[len(others) :]

    def _target(self, y: Tensor, t: Streams, kept: Streams) -> Tensor:
        """The target, from the step's output; gradients are off here."""
        if self.keeps_target:
            return kept[0]
        if self.keeps:
            assert self._grid is not None
            return self._grid.restore(self._estimate(_laid_out(y, self._layout[self.target]), t), Residual(*kept))
        return _changed(self._block, not self._inverse, self._grid, y, t)

    def _estimate(self, y: Tensor, t: Streams) -> Tensor:
        return _changed(self._block, not self._inverse, self._grid, y, t)

    def log_det(self, t: Streams) -> Tensor:
        return _log_det(self._block, self._inverse, t)


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

    def rewind(
        self,
        outputs: Streams,
        grads: Gradients,
        needs: Sequence[bool],
        leaves: list[Tensor],
        own: list[Tensor],
        kept: Streams,
        seen: Seen | None,
    ) -> tuple[Streams, list[Tensor | None]]:
        passage = self.passage
        context, undo = passage.arguments.filled(leaves), torch.no_grad()(run_whole)
        backwards = passage._replace(inverse=not passage.inverse, log_det=False, extent=None)
        streams = self._replay.again(own, undo, self._block, backwards, outputs, context)
        if [s.shape for s in streams] != self._shapes:
            raise RuntimeError(
                f"block {self.position} ({self.block_type}): {'forward' if passage.inverse else 'inverse'} returned streams of "
                f"shapes {_shapes(streams)}, to undo a pass that was given {_shapes(self._shapes)}"
            )
        inputs = tuple(map(_leaf, streams, self._strides, needs))
        # Off the grid: rounding has a derivative of 1.
        again = self._replay.again(own, run_whole, self._block, passage._replace(grid=None), inputs, context)
        if seen is not None:
            seen.graph(0, again, (*inputs, *leaves, *own))
        return streams, [*_gradients(again, (*inputs, *leaves, *own), grads)]


def _shapes(streams: Sequence[Tensor | torch.Size]) -> str:
    return ", ".join(str(tuple(s.shape if isinstance(s, Tensor) else s)) for s in streams)


def _rotate(items: list[T], by: int) -> list[T]:
    return items[by:] + items[:by] if by else items


def _log_det(block: Stepwise, inverse: bool, t: Streams) -> Tensor:
    log_derivative = block.log_derivative(*t).flatten(1).sum(1)
    return -log_derivative if inverse else log_derivative


def _total(log_dets: list[Tensor]) -> Tensor:
    return log_dets[0] if len(log_dets) == 1 else torch.stack(log_dets).sum(0)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _leaf(tensor: Tensor, strides: tuple[int, ...], needs_grad: bool) -> Tensor:
    """A leaf of a new graph, of the tensor's values, with the strides of the first run."""
    return _laid_out(tensor, strides).detach().requires_grad_(needs_grad)


def _laid_out(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The tensor with these strides (rule 5 of _rewind)."""
    if tensor.stride() == strides:
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _gradients(outputs: Streams, inputs: Streams, grads: Gradients) -> Gradients:
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
