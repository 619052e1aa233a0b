"""The engine: a chain of blocks whose backward pass rebuilds each block's input from its output.

One autograd Function a block. Its forward runs the block without a graph; its backward, the *rewind*, takes the block's
output from the tape, runs every conditioner once more with a graph, and uses that one evaluation for two things: its
value undoes the block, its graph gives the gradients. Parameters and context tensors are inputs of the Function, so that
gradients reach `.grad`, hooks and `autograd.grad` as autograd intends.

Rules of the tape:

1. A tape belongs to one forward call; nothing is stored on a module. The same block may stand in a chain twice.
2. Only the chain's output is saved (`_Anchor`), by `save_for_backward`: changing it in place, or a second backward without
   `retain_graph`, gives PyTorch's own error. Blocks save references to parameters and context, and no stream, except the
   streams that a coupling declares as anchors.
3. A rewind leaves the block's input for the block before it, under the number of the running backward. So two backwards
   over one graph do not mix.
4. It leaves nothing where the block before is not going to run in this backward (a leaf input, a frozen block, a partial
   `autograd.grad`), and it takes its own entry off before it does anything else. So nothing outlives a backward.
5. Both evaluations of a conditioner get the same strides: these decide the last bit of some activations.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
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


# --- passing blocks ---------------------------------------------------------------------------------------------------


class Tape:
    """Hands the rebuilt streams from one block's rewind to the next."""

    def __init__(self) -> None:
        self._streams: dict[int, Streams] = {}

    def leave(self, streams: Streams) -> None:
        self._streams[torch._C._current_graph_task_id()] = streams

    def take(self) -> Streams:
        return self._streams.pop(torch._C._current_graph_task_id())


class _Offer(NamedTuple):
    tape: Tape
    block: object
    streams: Streams


_thread = threading.local()


def through(tape: Tape, block: nn.Module, inverse: bool, streams: Streams, context: Context) -> Streams:
    """Pass `streams` through `block` and record it on `tape`.

    A stepwise block is called as any module is, with the tape on offer: the Function is applied inside its own forward,
    so that its hooks see an ordinary module.
    """
    if not isinstance(block, Stepwise):
        return _apply(_Whole(tape, block, inverse, streams, context), streams)
    _thread.offer, _thread.outputs = _Offer(tape, block, streams), None
    try:
        call: Callable[..., object] = block.inverse if inverse else block  # type: ignore[assignment]
        outputs, recorded = call(*streams, **context), _thread.outputs
    finally:
        _thread.offer, _thread.outputs = None, None
    if not _same(outputs, recorded):
        raise RuntimeError("a forward hook replaced its output, which cannot be undone; make that change a block")
    return recorded  # type: ignore[no-any-return]


def run_stepwise(block: Stepwise, inverse: bool, streams: Streams, context: Context) -> Streams:
    """A stepwise block's forward or inverse: on the tape if a chain has just called it, else under ordinary autograd."""
    offer: _Offer | None = getattr(_thread, "offer", None)
    if offer is None or offer.block is not block:
        return _run_plainly(block, inverse, streams, context)
    if not _same(streams, offer.streams):
        raise RuntimeError("a forward pre-hook replaced its input, which cannot be undone; make that change a block")
    _thread.offer = None  # whatever the block's conditioners call is not on this tape
    _thread.outputs = _apply(_Coupled(offer.tape, block, inverse, streams, context), streams)
    return _thread.outputs  # type: ignore[no-any-return]


def anchor(tape: Tape, streams: Streams, join: int | None) -> Tensor | Streams:
    """End a chain: its output, joined along the dimension `join` or left as a tuple, is saved for the backward pass."""
    if not any(s.requires_grad for s in streams):
        return streams if join is None else torch.cat(streams, join)
    return _Anchor.apply(tape, join, *streams)  # type: ignore[no-any-return, no-untyped-call]


def as_streams(value: object) -> Streams:
    """A block's result, checked to be a tuple of tensors."""
    if isinstance(value, tuple) and value and all(isinstance(s, Tensor) for s in value):
        return value
    raise TypeError(f"a block has to return a tuple of tensors, one a stream; this one returned {_described(value)}")


def _described(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _same(streams: object, expected: Streams | None) -> bool:
    return (
        isinstance(streams, tuple)
        and expected is not None
        and len(streams) == len(expected)
        and all(s is e for s, e in zip(streams, expected, strict=True))
    )


def _run_plainly(block: Stepwise, inverse: bool, streams: Streams, context: Context) -> Streams:
    before, after = _rotations(block, inverse)
    streams = _rotate(streams, before)
    for step in block.steps(inverse):
        target, others = _take(streams, step.target)
        streams = _put(others, step.target, step.apply(target, *step.coefficients(target, others, context)))
    return _rotate(streams, after)


def _apply(call: _Call, streams: Streams) -> Streams:
    return _Rewind.apply(call, *streams, *call.context, *call.parameters)  # type: ignore[no-any-return, no-untyped-call]


# --- the Functions ----------------------------------------------------------------------------------------------------


class _Rewind(torch.autograd.Function):
    """A block on a tape. Where nothing needs a gradient it leaves no node: frozen leading blocks are never rewound."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> Streams:
        streams, context, parameters = call.parts(tensors)
        needs = ctx.needs_input_grad[1:]
        outputs, anchors = call.first(streams, call.arguments(context), needs)
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*context, *parameters, *anchors)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        call: _Call = ctx.call
        outputs = call.tape.take()
        saved: Streams = ctx.saved_tensors
        known = len(call.context) + len(call.parameters)
        leaves = tuple(t.detach().requires_grad_(t.requires_grad) for t in saved[:known])
        streams, found = call.rewind(outputs, grads, leaves, saved[known:])
        if _runs_before(ctx, call.tape):
            call.tape.leave(streams)
        return (None, *(g if need else None for g, need in zip(found, ctx.needs_input_grad[1:], strict=True)))


class _Anchor(torch.autograd.Function):
    """The end of a chain: saves its output, and puts it on the tape when the backward pass begins."""

    @staticmethod
    def forward(ctx: Any, tape: Tape, join: int | None, *streams: Tensor) -> Tensor | Streams:
        ctx.tape, ctx.join = tape, join
        ctx.sizes = None if join is None else [s.shape[join] for s in streams]
        ctx.set_materialize_grads(False)
        if join is None:
            ctx.save_for_backward(*streams)
            return tuple(s.view_as(s) for s in streams)
        output = torch.cat(streams, join)
        ctx.save_for_backward(output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        saved: Streams = ctx.saved_tensors
        if ctx.join is not None:
            saved = saved[0].split(ctx.sizes, ctx.join)
            grads = (None,) * len(saved) if grads[0] is None else grads[0].split(ctx.sizes, ctx.join)
        ctx.tape.leave(saved)
        return (None, None, *grads)


def _runs_before(ctx: Any, tape: Tape) -> bool:
    """Whether the block before this one is on the tape too and runs in this backward (rule 4)."""
    nodes = {node for node, _ in ctx.next_functions if getattr(getattr(node, "call", None), "tape", None) is tape}
    return any(torch._C._will_engine_execute_node(node) for node in nodes)


# --- blocks, run twice ------------------------------------------------------------------------------------------------


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
            _with_strides(s, strides).detach().requires_grad_(need)  # rule 5
            for s, strides, need in zip(streams, self._strides, self._needs, strict=True)
        )
        return self._replay.again(lambda: function(leaves, context), parameters), leaves

    def value(self, function: Callable[[], Streams], parameters: Streams) -> Streams:
        """Another function's value, without a graph, under the conditions of the first run."""
        return self._replay.again(torch.no_grad()(function), parameters)  # type: ignore[no-any-return]


class _Call(ABC):
    """One block, passed once in one direction."""

    def __init__(self, tape: Tape, streams: Streams, context: Context) -> None:
        self.tape = tape
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


class _Coupled(_Call):
    """A stepwise block: each conditioner runs once in `first` and once in `rewind`."""

    def __init__(self, tape: Tape, block: Stepwise, inverse: bool, streams: Streams, context: Context) -> None:
        super().__init__(tape, streams, context)
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


class _Whole(_Call):
    """A block known by `forward` and `inverse` alone: undone, then run again; three evaluations a step."""

    def __init__(self, tape: Tape, block: nn.Module, inverse: bool, streams: Streams, context: Context) -> None:
        super().__init__(tape, streams, context)
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


# --- small parts ------------------------------------------------------------------------------------------------------


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
