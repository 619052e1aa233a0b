"""The engine: a chain of blocks whose backward pass rebuilds each block's input from its output.

One autograd Function a block. Its forward runs the block without a graph; its backward, the *rewind*, takes the block's
output from the tape, runs every conditioner once more with a graph, and uses that one evaluation for two things: its
value undoes the block, its graph gives the gradients. Parameters and context tensors are inputs of the Function, so that
gradients reach `.grad`, hooks and `autograd.grad` as autograd intends.

Rules of the tape:

1. A tape belongs to one forward call; nothing is stored on a module. The same block may stand in a chain twice.
2. Only the chain's output is saved (`_Anchor`), by `save_for_backward`: changing it in place, or a second backward without
   `retain_graph`, gives PyTorch's own error. Blocks save references to parameters and context, and no stream, except the
   streams that a coupling declares as anchors, the residuals that take their place in exact arithmetic, and the guard's few
   values.
3. A rewind leaves the block's input for the block before it, under the number of the running backward. So two backwards
   over one graph do not mix.
4. It leaves nothing where the block before is not going to run in this backward (a leaf input, a frozen block, a partial
   `autograd.grad`), and it takes its own entry off before it does anything else. So nothing outlives a backward.
5. Both evaluations of a conditioner get the same strides: these decide the last bit of some activations.
6. Nothing refers back to the tape from the tape: a graph that is dropped is freed at once, without the garbage collector.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from revflow._base.second_derivative import once
from revflow._base.streams import Gradients, Streams, versions_of
from revflow._base.torch_private import is_going_to_run
from revflow._guard.chains import Evidence
from revflow._replay.mode import refuse_compiled_autograd
from revflow._rewind.blocks import BlockCall
from revflow._rewind.conditioner import RewindInputs
from revflow._rewind.graph import alias_of, laid_out
from revflow._rewind.tape import Tape


def _begin_here(ctx: Any, tape: Tape) -> tuple[list[Tensor], Evidence | None, Streams]:
    outputs = [reference() for reference in getattr(ctx, "outputs", ())]
    streams = [o for o in outputs if o is not None]
    if not streams or len(streams) < len(outputs):
        raise RuntimeError(
            f"a backward pass begins at block {ctx.call.position}, and not at the output of its sequence, from which blocks are "
            f"recomputed. For a loss of this block's output alone let a forward hook keep the whole output, a tuple; or "
            f"add `0 * y.sum()` of the sequence's output y to the loss"
        )
    if versions_of(streams) != ctx.versions:
        raise RuntimeError(
            f"the output of block {ctx.call.position} was modified by an inplace operation, and is still needed"
        )
    return tape.begin([s.detach() for s in streams])


def end(
    tape: Tape | None, streams: Streams, join: int | None, log_det: Tensor | None, kept_follow: bool = False
) -> tuple[Streams, Tensor | None]:
    """End a chain, or that part of it which is rebuilt if blocks that are kept follow.

    Returns its streams, joined along the dimension `join` if that is not None, and its log-determinant if wanted. On a tape
    the output is anchored. The log-determinant passes through the anchor too, so that its backward begins there.
    """
    more = () if log_det is None else (log_det,)
    if tape is None or not any(s.requires_grad for s in (*streams, *more)):
        return (streams if join is None else (torch.cat(streams, join),)), log_det
    outputs: Streams = _Anchor.apply(tape, join, kept_follow, len(streams), *streams, *more)  # type: ignore[no-untyped-call]
    return (outputs, None) if log_det is None else (outputs[:-1], outputs[-1])


def applied(call: BlockCall, streams: Streams) -> Streams:
    return _apply_rewind(call, *streams, *call.tape.arguments.tensors, *call.parameters)  # type: ignore[no-any-return, no-untyped-call]


class _Rewind(torch.autograd.Function):
    """A block on a tape. Where nothing needs a gradient it leaves no node: frozen leading blocks are never rewound."""

    @staticmethod
    def forward(ctx: Any, call: BlockCall, *tensors: Tensor) -> Streams:
        tape, leaves = call.tape, call.tape.arguments.tensors
        streams = tensors[: len(tensors) - len(leaves) - len(call.parameters)]
        witness = tape.witness
        first = call.first if tape.meter is None else partial(tape.meter.first, call)
        if witness is None or not call.foreign:
            outputs, stored = first(streams, leaves)
        else:
            with witness.remember(call):
                outputs, stored = first(streams, leaves)
        ctx.call = call
        samples: Streams = ()
        if witness is not None and any(ctx.needs_input_grad):
            samples = witness.samples(call.rebuilt(streams))
        ctx.set_materialize_grads(False)
        # All that differs from run to run: where torch.utils.checkpoint runs a chain again, of the same run as the output.
        moved = call.moved()
        ctx.counts = len(stored), len(moved)
        ctx.save_for_backward(*leaves, *call.checked, *stored, *moved, *samples)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        if torch.is_grad_enabled():
            return once(_rewind, ctx, grads, [g for g in grads if g is not None])
        return _rewind(ctx, grads)


# Without what Function.apply does for functorch's transforms: under those there is no tape.
_apply_rewind = super(torch.autograd.Function, _Rewind).apply


def _rewind(ctx: Any, grads: Gradients) -> Gradients:
    call: BlockCall = ctx.call
    tape = call.tape
    now, evidence, _output = tape.pop() or _begin_here(ctx, tape)
    saved: Streams = ctx.saved_tensors
    begin = len(tape.arguments.tensors)
    end = begin + len(call.parameters)
    # An alias a place: a tensor may stand in the context twice, or be a parameter too.
    leaves = [*map(alias_of, saved[:begin])]
    own = own_of(call.parameters)
    stored, moved = ctx.counts
    stored_end, moved_end = end + stored, end + stored + moved
    if moved:
        call.recall(saved[stored_end:moved_end])
    call.samples = saved[moved_end:]
    needs = ctx.needs_input_grad[1:]
    seen = None if evidence is None else tape.witness.watch(evidence, call)  # type: ignore[union-attr]
    found = call.rewind(now, RewindInputs(grads, needs, leaves, own, saved[end:stored_end], seen))
    if seen is not None:
        seen.inputs(call.rebuilt(tuple(now)))
    if call.before is not None and is_going_to_run(call.before):  # rule 4
        tape.push(now, evidence)
    elif evidence is not None:
        tape.witness.judge(evidence, tuple(now))  # type: ignore[union-attr]
    return (None, *found)


def own_of(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The parameters to evaluate with: themselves, or an alias of what another module has computed.

    Their hooks keep quiet meanwhile (`graph.gradients`): they see the whole gradient, when the Function returns it. An alias
    would keep them away, too, but another thread would find it in the module's place.
    """
    return [p if p.grad_fn is None else alias_of(p) for p in parameters]


class _Anchor(torch.autograd.Function):
    """The end of a chain: saves its output, and puts it on the tape when the backward pass begins."""

    @staticmethod
    def forward(ctx: Any, tape: Tape, join: int | None, kept_follow: bool, count: int, *tensors: Tensor) -> Streams:
        streams, log_det = tensors[:count], tensors[count:]
        ctx.tape, ctx.join, ctx.kept_follow = tape, join, kept_follow
        if join is not None:
            ctx.sizes, ctx.strides = [s.shape[join] for s in streams], [s.stride() for s in streams]
        ctx.set_materialize_grads(False)
        outputs = tuple(s.view_as(s) for s in streams) if join is None else (torch.cat(streams, join),)
        ctx.save_for_backward(*outputs)
        return (*outputs, *(d.view_as(d) for d in log_det))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        refuse_compiled_autograd()
        if torch.is_grad_enabled():
            return once(_begin, ctx, grads, ctx.saved_tensors)
        return _begin(ctx, grads)


def _begin(ctx: Any, grads: Gradients) -> Gradients:
    saved: Streams = ctx.saved_tensors
    output: Streams = ()
    if ctx.join is None:
        streams = [s.detach() for s in saved]
        output = () if ctx.kept_follow else saved
    else:
        # Laid out as the blocks had them: so the joined output can go as soon as nothing else needs it.
        parts = saved[0].split(ctx.sizes, ctx.join)
        streams = list(map(laid_out, parts, ctx.strides))
        joined = grads[0]
        split = (None,) * len(streams) if joined is None else joined.split(ctx.sizes, ctx.join)
        grads = (*split, *grads[1:])
    ctx.tape.push(streams, ctx.tape.witness and ctx.tape.witness.begin(tuple(streams)), output)
    return (None, None, None, None, *grads)


def hold(lifetime: Tensor, streams: Streams, log_det: Tensor | None) -> tuple[Streams, Tensor | None]:
    """The streams and the log-determinant, whose graph holds on to `lifetime` until it is freed."""
    more = () if log_det is None else (log_det,)
    held: Streams = _Hold.apply(lifetime, *streams, *more)  # type: ignore[no-untyped-call]
    return (held, None) if log_det is None else (held[:-1], held[-1])


class _Hold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, lifetime: Tensor, *tensors: Tensor) -> Streams:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(lifetime)
        return tuple([t.view_as(t) for t in tensors])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        return (None, *grads)
