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
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from revflow._passes import Call, Context, Coupled, Gradients, Stepwise, Streams, Whole, run_plainly


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


class _Recorded(NamedTuple):
    streams: Streams
    versions: list[int]


_thread = threading.local()


def through(tape: Tape, block: nn.Module, inverse: bool, streams: Streams, context: Context) -> Streams:
    """Pass `streams` through `block` and record it on `tape`.

    A stepwise block is called as any module is, with the tape on offer: the Function is applied inside its own forward,
    so that its hooks see an ordinary module.
    """
    if not isinstance(block, Stepwise):
        return _apply(tape, Whole(block, inverse, streams, context), streams)
    _thread.offer, _thread.recorded = _Offer(tape, block, streams), None
    try:
        call: Callable[..., object] = block.inverse if inverse else block  # type: ignore[assignment]
        outputs, recorded = call(*streams, **context), _thread.recorded
    finally:
        _thread.offer, _thread.recorded = None, None
    if recorded is None or not _same(outputs, recorded.streams) or recorded.versions != _versions(recorded.streams):
        raise RuntimeError("a forward hook replaced its output, which cannot be undone; make that change a block")
    return recorded.streams  # type: ignore[no-any-return]


def run_stepwise(block: Stepwise, inverse: bool, streams: Streams, context: Context) -> Streams:
    """A stepwise block's forward or inverse: on the tape if a chain has just called it, else under ordinary autograd."""
    offer: _Offer | None = getattr(_thread, "offer", None)
    if offer is None or offer.block is not block:
        return run_plainly(block, inverse, streams, context)
    if not _same(streams, offer.streams):
        raise RuntimeError("a forward pre-hook replaced its input, which cannot be undone; make that change a block")
    _thread.offer = None  # whatever the block's conditioners call is not on this tape
    outputs = _apply(offer.tape, Coupled(block, inverse, streams, context), streams)
    _thread.recorded = _Recorded(outputs, _versions(outputs))
    return outputs


def anchor(tape: Tape, streams: Streams, join: int | None) -> Tensor | Streams:
    """End a chain: its output, joined along the dimension `join` or left as a tuple, is saved for the backward pass."""
    if not any(s.requires_grad for s in streams):
        return streams if join is None else torch.cat(streams, join)
    return _Anchor.apply(tape, join, *streams)  # type: ignore[no-any-return, no-untyped-call]


def _same(streams: object, expected: Streams) -> bool:
    return (
        isinstance(streams, tuple)
        and len(streams) == len(expected)
        and all(s is e for s, e in zip(streams, expected, strict=True))
    )


def _versions(streams: Streams) -> list[int]:
    """How often each has been changed in place."""
    return [s._version for s in streams]


def _apply(tape: Tape, call: Call, streams: Streams) -> Streams:
    return _Rewind.apply(tape, call, *streams, *call.context, *call.parameters)  # type: ignore[no-any-return, no-untyped-call]


class _Rewind(torch.autograd.Function):
    """A block on a tape. Where nothing needs a gradient it leaves no node: frozen leading blocks are never rewound."""

    @staticmethod
    def forward(ctx: Any, tape: Tape, call: Call, *tensors: Tensor) -> Streams:
        streams, context, parameters = call.parts(tensors)
        needs = ctx.needs_input_grad[2:]
        outputs, anchors = call.first(streams, call.arguments(context), needs)
        ctx.tape, ctx.call = tape, call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*context, *parameters, *anchors)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        call: Call = ctx.call
        outputs = ctx.tape.take()
        saved: Streams = ctx.saved_tensors
        known = len(call.context) + len(call.parameters)
        leaves = tuple(t.detach().requires_grad_(t.requires_grad) for t in saved[:known])
        streams, found = call.rewind(outputs, grads, leaves, saved[known:])
        if _runs_before(ctx):
            ctx.tape.leave(streams)
        return (None, None, *(g if need else None for g, need in zip(found, ctx.needs_input_grad[2:], strict=True)))


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


def _runs_before(ctx: Any) -> bool:
    """Whether the block before this one is on the tape too and runs in this backward (rule 4)."""
    nodes = {node for node, _ in ctx.next_functions if getattr(node, "tape", None) is ctx.tape}
    return any(torch._C._will_engine_execute_node(node) for node in nodes)
