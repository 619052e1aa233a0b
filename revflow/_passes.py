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
    tape: Tape | None
    """None under ordinary autograd."""


def run_plainly(block: Stepwise, inverse: bool, log_det: bool, streams: Streams, context: Context) -> Streams:
    """The block's output under ordinary autograd."""
    apply = block.separate if inverse else block.combine
    now = _rotate([*streams], -block.rotation if inverse else 0)
    log_dets: list[Tensor] = []
    conditioners = block.conditioners(streams)
    for k, conditioner in reversed(conditioners) if inverse else conditioners:
        t = block.evaluate(conditioner, now[k], now[:k] + now[k + 1 :], context)
        now[k] = apply(now[k], *t)
        if log_det:
            log_dets.append(_log_det(block, inverse, t))
    now = _rotate(now, 0 if inverse else block.rotation)
    return (*now, _total(log_dets)) if log_det else tuple(now)


def run_whole(block: nn.Module, inverse: bool, log_det: bool, streams: Streams, context: Context) -> Streams:
    """As `run_plainly`, for a block known by `forward` and `inverse` alone."""
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
        """The block's output, and the streams to keep as anchors."""

    @abstractmethod
    def rewind(
        self,
        outputs: Streams,
        grads: Gradients,
        needs: Sequence[bool],
        leaves: list[Tensor],
        own: list[Tensor],
        anchors: Streams,
        seen: Seen | None,
    ) -> tuple[Streams, list[Tensor | None]]:
        """The block's input, and the gradients of its streams, of the context's tensors and of the parameters.

        `needs` says which streams want a gradient; `leaves` stand for the context's tensors, `own` for the parameters.
        `seen` is the guard's, to be told of outputs whose input is an anchor.
        """


class Coupled(Call):
    """A stepwise block: each conditioner runs once in `first` and once in `rewind`."""

    __slots__ = ("_rotations", "_steps")

    def __init__(self, passage: Passage, position: str, block: Stepwise, before: Any, streams: Streams) -> None:
        super().__init__(passage, position, block, before)  # type: ignore[arg-type]
        inverse, device = passage.inverse, streams[0].device
        self._rotations = (-block.rotation, 0) if inverse else (0, block.rotation)
        self._steps = [_Step(block, inverse, k, conditioner, device) for k, conditioner in block.conditioners(streams)]
        if inverse:
            self._steps.reverse()
        self.replays = self._steps
        for step in self._steps:
            self.parameters += step.parameters

    def first(self, streams: Streams, context: Context) -> tuple[Streams, Streams]:
        now = _rotate([*streams], self._rotations[0])
        anchors: list[Tensor] = []
        log_dets: list[Tensor] = []
        for step in self._steps:
            if step.keeps_target:
                anchors.append(now[step.target])
            t = step.run(self.passage.draws, now, context)
            if self.passage.log_det:
                log_dets.append(step.log_det(t))
        now = _rotate(now, self._rotations[1])
        return (*now, _total(log_dets)) if log_dets else tuple(now), tuple(anchors)

    def rewind(
        self,
        outputs: Streams,
        grads: Gradients,
        needs: Sequence[bool],
        leaves: list[Tensor],
        own: list[Tensor],
        anchors: Streams,
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
            anchor = anchors[i] if step.keeps_target else None
            found = step.undo(now, now_grads, grads[count:], wants, context, leaves, own[begin:end], anchor, seen)
            for j in range(len(leaves)):
                leaf_grads[j] = _sum(leaf_grads[j], found[j])
            own_grads[:0] = found[len(leaves) :]
            end = begin
        return tuple(_rotate(now, -before)), _rotate(now_grads, -before) + leaf_grads + own_grads


class _Step(Replay):
    """One conditioner of a stepwise block, and the stream that it overwrites."""

    __slots__ = ("_block", "_conditioner", "_inverse", "_strides", "keeps_target", "target")

    def __init__(
        self, block: Stepwise, inverse: bool, target: int, conditioner: nn.Module, device: torch.device
    ) -> None:
        super().__init__(conditioner, device)
        self.target = target
        self.keeps_target = block.ill_conditioned and not inverse
        self._block, self._inverse, self._conditioner = block, inverse, conditioner
        self._strides: list[tuple[int, ...]] = []

    def run(self, draws: Draws, now: list[Tensor], context: Context) -> Streams:
        """Overwrite the target in `now`; returns the coefficients."""
        k, block = self.target, self._block
        others = now[:k] + now[k + 1 :]
        self._strides = [s.stride() for s in others]
        versions = [s._version for s in others]
        t = self.first(draws, block.evaluate, self._conditioner, now[k], others, context)
        if [s._version for s in others] != versions:
            raise RuntimeError(
                f"the conditioner {type(self._conditioner).__name__} changed its input in place (by a first layer with "
                f"inplace=True, say), which cannot be undone; let it work on a copy"
            )
        now[k] = (block.separate if self._inverse else block.combine)(now[k], *t)
        return t

    def undo(
        self,
        now: list[Tensor],
        grads: list[Tensor | None],
        log_det_grad: Gradients,
        wants: list[bool],
        context: Context,
        leaves: list[Tensor],
        own: list[Tensor],
        anchor: Tensor | None,
        seen: Seen | None,
    ) -> Gradients:
        """Bring the streams in `now`, and their gradients in `grads`, from after the step to before it.

        Returns the gradients of `leaves` and `own`.
        """
        k, block = self.target, self._block
        y, y_grad = now[k], grads[k]
        others = [*range(k), *range(k + 1, len(now))]
        inputs = [_leaf(now[j], strides, wants[j]) for j, strides in zip(others, self._strides, strict=True)]
        t = self.again(own, block.evaluate, self._conditioner, y, inputs, context)
        if seen is not None:
            seen.graph(k, t, (*inputs, *leaves, *own))
        if anchor is None:
            anchor = (block.combine if self._inverse else block.separate)(y, *t)  # no graph: gradients are off here
        now[k] = anchor
        if block.translates:
            if self._inverse and y_grad is not None:
                y_grad = -y_grad
            found = _gradients(t, (*inputs, *leaves, *own), (y_grad,))
        else:
            with torch.enable_grad():
                x = anchor.detach().requires_grad_()
                outputs: Streams = ((block.separate if self._inverse else block.combine)(x, *t),)
                if log_det_grad:
                    outputs = (*outputs, self.log_det(t))
            if self.keeps_target and seen is not None:
                seen.output(y, outputs[0])
            grads[k], *found = _gradients(outputs, (x, *inputs, *leaves, *own), (y_grad, *log_det_grad))
        for i, j in enumerate(others):
            grads[j] = _sum(grads[j], found[i])
        return found[len(others) :]

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
        inverse, log_det, _, draws, _ = self.passage
        return self._replay.first(draws, run_whole, self._block, inverse, log_det, streams, context), ()

    def rewind(
        self,
        outputs: Streams,
        grads: Gradients,
        needs: Sequence[bool],
        leaves: list[Tensor],
        own: list[Tensor],
        anchors: Streams,
        seen: Seen | None,
    ) -> tuple[Streams, list[Tensor | None]]:
        inverse, log_det, arguments, _, _ = self.passage
        context, undo = arguments.filled(leaves), torch.no_grad()(run_whole)
        streams = self._replay.again(own, undo, self._block, not inverse, False, outputs, context)
        if [s.shape for s in streams] != self._shapes:
            raise RuntimeError(
                f"block {self.position} ({self.block_type}): {'forward' if inverse else 'inverse'} returned streams of shapes "
                f"{_shapes(streams)}, to undo a pass that was given {_shapes(self._shapes)}"
            )
        inputs = tuple(map(_leaf, streams, self._strides, needs))
        again = self._replay.again(own, run_whole, self._block, inverse, log_det, inputs, context)
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
    """A leaf of a new graph, of the tensor's values, with the strides of the first run (rule 5 of _rewind)."""
    if tensor.stride() != strides:
        tensor = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
    return tensor.detach().requires_grad_(needs_grad)


def _gradients(outputs: Streams, inputs: Streams, grads: Gradients) -> Gradients:
    """The gradients of `inputs`; None for those that want none or that the outputs do not depend on.

    This is torch.autograd.grad without its checks of the arguments, which for small conditioners take as long as it does.
    """
    wanted = tuple([i for i in inputs if i.requires_grad])
    if len(outputs) > 1 or grads[0] is None or not outputs[0].requires_grad:
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
