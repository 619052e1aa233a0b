"""One pass through a block, made to be undone: what its forward pass remembers, and how its rewind uses that.

A stepwise block (a coupling) is taken apart into steps: each conditioner is evaluated once in the forward pass and once in
the rewind. Any other block is undone by its `inverse` and run again: three evaluations. No autograd Function is defined
here, and no concrete coupling known.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from revflow._replay import Replay

T = TypeVar("T")
Streams = tuple[Tensor, ...]
Coefficients = tuple[Tensor, ...]
Context = dict[str, Any]
Gradients = tuple[Tensor | None, ...]


class Step(NamedTuple):
    """One stream overwritten by an elementwise map whose coefficients a conditioner computes from the other streams:
    `streams[target] = apply(streams[target], *t)`."""

    target: int
    conditioner: nn.Module
    coefficients: Callable[[Tensor, Streams, Context], Coefficients]
    """(a tensor of the target's shape and dtype, the other streams, context) -> t."""
    apply: Callable[..., Tensor]
    undo: Callable[..., Tensor]
    keep_target: bool
    """Keep the overwritten stream as an anchor instead of rebuilding it: `undo` is ill-conditioned."""


class Stepwise(ABC):
    """A block that the engine takes apart, so that each conditioner runs exactly twice a training step.

    Forward: the steps, then the streams rotated to the left by `rotation`. Inverse: rotated back, then the steps undone.
    """

    rotation: int

    @abstractmethod
    def steps(self, inverse: bool) -> list[Step]:
        """The steps of the block's forward or inverse, in the order in which they run."""


def run_plainly(block: Stepwise, inverse: bool, streams: Streams, context: Context) -> Streams:
    before, after = _rotations(block, inverse)
    streams = _rotate(streams, before)
    for step in block.steps(inverse):
        target, others = _take(streams, step.target)
        streams = _put(others, step.target, step.apply(target, *step.coefficients(target, others, context)))
    return _rotate(streams, after)


def as_streams(value: object) -> Streams:
    """A block's result, checked to be a tuple of tensors."""
    if isinstance(value, tuple) and value and all(isinstance(s, Tensor) for s in value):
        return value
    raise TypeError(f"a block has to return a tuple of tensors, one a stream; this one returned {_described(value)}")


def _described(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


class _Twice:
    """A function of streams, context and a module's parameters: run once without a graph, then again with one."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._replay = Replay(module, device)
        self._strides: list[tuple[int, ...]] = []
        self._needs: Sequence[bool] = ()

    @property
    def parameters(self) -> list[Tensor]:
        return self._replay.parameters

    def first(
        self, function: Callable[[Streams, Context], Streams], streams: Streams, context: Context, needs: Sequence[bool]
    ) -> Streams:
        """The function's value; `needs` says which streams want a gradient."""
        self._strides, self._needs = [s.stride() for s in streams], needs
        return self._replay.first(lambda: function(streams, context))  # type: ignore[no-any-return]

    def again(
        self, function: Callable[[Streams, Context], Streams], streams: Streams, context: Context, parameters: Streams
    ) -> tuple[Streams, Streams]:
        """The function's value with its graph, and the leaves of that graph that stand for the streams."""
        leaves = tuple(
            _with_strides(s, strides).detach().requires_grad_(need)  # rule 5 of _rewind
            for s, strides, need in zip(streams, self._strides, self._needs, strict=True)
        )
        return self._replay.again(lambda: function(leaves, context), parameters), leaves

    def value(self, function: Callable[[], Streams], parameters: Streams) -> Streams:
        """Another function's value, without a graph, under the conditions of the first run."""
        return self._replay.again(torch.no_grad()(function), parameters)  # type: ignore[no-any-return]


class Call(ABC):
    """One block, passed once in one direction."""

    def __init__(self, streams: Streams, context: Context) -> None:
        self._streams = len(streams)
        self._spec: pytree.TreeSpec | None = None
        leaves: list[Any] = []
        if context:
            leaves, self._spec = pytree.tree_flatten(context)
        self.context: list[Tensor] = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self._others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.parameters: list[Tensor] = []

    def arguments(self, tensors: Sequence[Tensor]) -> Context:
        """The keyword arguments, with `tensors` in the place of theirs."""
        if self._spec is None:
            return {}
        leaves: list[Any] = list(self._others)
        for i, tensor in zip(self._positions, tensors, strict=True):
            leaves[i] = tensor
        context: Context = pytree.tree_unflatten(leaves, self._spec)
        return context

    def parts(self, tensors: Streams) -> tuple[Streams, Streams, Streams]:
        """Streams, context tensors and parameters from the Function's arguments."""
        first, second = self._streams, self._streams + len(self.context)
        return tensors[:first], tensors[first:second], tensors[second:]

    @abstractmethod
    def first(self, streams: Streams, context: Context, needs: Sequence[bool]) -> tuple[Streams, Streams]:
        """The block's output, and the streams to keep as anchors."""

    @abstractmethod
    def rewind(
        self, outputs: Streams, grads: Gradients, leaves: Streams, anchors: Streams
    ) -> tuple[Streams, Gradients]:
        """The block's input, and the gradients of its streams, context tensors and parameters.

        `leaves` stand for the context tensors and the parameters.
        """


class Coupled(Call):
    """A stepwise block: each conditioner runs once in `first` and once in `rewind`."""

    def __init__(self, block: Stepwise, inverse: bool, streams: Streams, context: Context) -> None:
        super().__init__(streams, context)
        self._before, self._after = _rotations(block, inverse)
        self._runs = [(step, _Twice(step.conditioner, streams[0].device)) for step in block.steps(inverse)]
        self.parameters = [p for _, run in self._runs for p in run.parameters]

    def first(self, streams: Streams, context: Context, needs: Sequence[bool]) -> tuple[Streams, Streams]:
        anchors: Streams = ()
        stream_needs = _rotate(tuple(needs[: len(streams)]), self._before)
        streams = _rotate(streams, self._before)
        from_context = any(needs[len(streams) : len(streams) + len(self.context)])
        for step, run in self._runs:
            target, others = _take(streams, step.target)
            target_needs, others_need = _take(stream_needs, step.target)
            if step.keep_target:
                anchors = (*anchors, target)
            t = run.first(partial(step.coefficients, target), others, context, others_need)
            streams = _put(others, step.target, step.apply(target, *t))
            from_step = from_context or any(others_need) or any(p.requires_grad for p in run.parameters)
            stream_needs = _put(others_need, step.target, target_needs or from_step)
        return _rotate(streams, self._after), anchors

    def rewind(
        self, outputs: Streams, grads: Gradients, leaves: Streams, anchors: Streams
    ) -> tuple[Streams, Gradients]:
        streams, stream_grads = _rotate(outputs, -self._after), _rotate(grads, -self._after)
        context, parameters = leaves[: len(self.context)], leaves[len(self.context) :]
        arguments = self.arguments(context)
        context_grads: Gradients = (None,) * len(context)
        parameter_grads: Gradients = ()
        for step, run in reversed(self._runs):
            first = len(parameters) - len(run.parameters)
            parameters, own = parameters[:first], parameters[first:]
            y, others = _take(streams, step.target)
            y_grad, other_grads = _take(stream_grads, step.target)
            t, inputs = run.again(partial(step.coefficients, y), others, arguments, own)
            values = tuple(c.detach() for c in t)
            if step.keep_target:
                anchors, x = anchors[:-1], anchors[-1]
            else:
                x = step.undo(y, *values)
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                again = step.apply(leaf, *t)
            x_grad, found = _take(_gradients((again,), (leaf, *inputs, *context, *own), (y_grad,)), 0)
            streams = _put(others, step.target, x)
            stream_grads = _put(_sum(other_grads, found[: len(inputs)]), step.target, x_grad)
            context_grads = _sum(context_grads, found[len(inputs) : len(inputs) + len(context)])
            parameter_grads = (*found[len(inputs) + len(context) :], *parameter_grads)
        return _rotate(streams, -self._before), (
            *_rotate(stream_grads, -self._before),
            *context_grads,
            *parameter_grads,
        )


class Whole(Call):
    """A block known by `forward` and `inverse` alone: undone, then run again; three evaluations a step."""

    def __init__(self, block: nn.Module, inverse: bool, streams: Streams, context: Context) -> None:
        super().__init__(streams, context)
        undo: Callable[..., object] = block.inverse  # type: ignore[assignment]
        self._forward: Callable[..., object] = undo if inverse else block
        self._undo: Callable[..., object] = block if inverse else undo
        self._run = _Twice(block, streams[0].device)
        self.parameters = self._run.parameters

    def _function(self, streams: Streams, context: Context) -> Streams:
        return as_streams(self._forward(*streams, **context))

    def first(self, streams: Streams, context: Context, needs: Sequence[bool]) -> tuple[Streams, Streams]:
        return self._run.first(self._function, streams, context, needs[: len(streams)]), ()

    def rewind(
        self, outputs: Streams, grads: Gradients, leaves: Streams, anchors: Streams
    ) -> tuple[Streams, Gradients]:
        context, parameters = leaves[: len(self.context)], leaves[len(self.context) :]
        arguments = self.arguments(context)
        streams = self._run.value(lambda: as_streams(self._undo(*outputs, **arguments)), parameters)
        again, inputs = self._run.again(self._function, streams, arguments, parameters)
        return streams, _gradients(again, (*inputs, *leaves), grads)


def _rotations(block: Stepwise, inverse: bool) -> tuple[int, int]:
    """How far the streams are rotated before and after the steps."""
    return (-block.rotation, 0) if inverse else (0, block.rotation)


def _rotate(items: tuple[T, ...], by: int) -> tuple[T, ...]:
    return items[by:] + items[:by]


def _take(items: tuple[T, ...], index: int) -> tuple[T, tuple[T, ...]]:
    return items[index], items[:index] + items[index + 1 :]


def _put(others: tuple[T, ...], index: int, item: T) -> tuple[T, ...]:
    return (*others[:index], item, *others[index:])


def _sum(a: Gradients, b: Gradients) -> Gradients:
    return tuple(y if x is None else x if y is None else x + y for x, y in zip(a, b, strict=True))


def _with_strides(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    if tensor.stride() == strides:
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _gradients(outputs: Streams, inputs: Streams, grads: Sequence[Tensor | None]) -> Gradients:
    """The gradients of `inputs`; None for those that want none or that the outputs do not depend on."""
    known = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad and g is not None]
    wanted = [i for i in inputs if i.requires_grad]
    if not known or not wanted:
        return (None,) * len(inputs)
    found = iter(torch.autograd.grad([o for o, _ in known], wanted, [g for _, g in known], allow_unused=True))
    return tuple(next(found) if i.requires_grad else None for i in inputs)
