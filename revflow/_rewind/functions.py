"""The autograd Functions of a sequence: their backward pass recomputes each block's input from its output.

There is one Function per block. Its forward runs the block without a graph. Its backward takes the block's output from the
tape, and evaluates every conditioner again, with a graph. This evaluation has two uses: its value inverts the block, and its
graph gives the gradients. Parameters and tensors among the keyword arguments are inputs of the Function. So gradients reach
`.grad`, hooks and `autograd.grad` in autograd's own ways.

Rules of the tape:

1. A tape belongs to one forward call, and nothing is stored on a module. So a sequence may contain the same block twice.
2. Only the sequence's output is saved (`_Anchor`), by `save_for_backward`. If it is changed in place, or a second backward pass
   runs without `retain_graph`, PyTorch raises its own error. Blocks save references to parameters and keyword arguments, but
   no streams. The exceptions are the streams that a coupling declares as ill-conditioned, the residuals that replace them in
   exact arithmetic, and the guard's few values.
3. The inversion of a block leaves the block's input on the tape for the block before, under the number of the running backward
   pass. So two backward passes through one graph do not interfere.
4. It leaves nothing if this backward pass will not reach the block before: a leaf input, a frozen block, a partial
   `autograd.grad`. It removes its own entry before it does anything else. So nothing outlives a backward pass.
5. Both evaluations of a conditioner get the same strides, which determine the last bit of some activations.
6. No object on the tape refers to the tape. So a graph that is dropped is freed at once, without the garbage collector.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from revflow._base.second_derivative import once
from revflow._base.streams import Gradients, Streams, versions_of
from revflow._base.torch_private import is_going_to_run, node_type
from revflow._replay.refusals import refuse_compiled_autograd
from revflow._rewind.blocks import BlockCall
from revflow._rewind.graph import alias_of, laid_out
from revflow._rewind.passage import RewindInputs
from revflow._rewind.tape import Entry, Tape


def applied(call: BlockCall, streams: Streams) -> Streams:
    """The output of a block, and its log-determinant if that is computed."""
    return _apply_rewind(call, *streams, *call.tape.arguments.tensors, *call.parameters)  # type: ignore[no-any-return, no-untyped-call]


class _Rewind(torch.autograd.Function):
    """A block on a tape.

    If none of its inputs requires a gradient, autograd adds no node. So frozen blocks at the beginning are never inverted.
    """

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
            samples = witness.samples(call.recomputed(streams))
        ctx.set_materialize_grads(False)
        # The tensors that depend on this run are saved, not attributes of `ctx`: if torch.utils.checkpoint runs the sequence
        # again, it replaces saved tensors by those of the second run. So all of them are from the same run as the output.
        moved = call.moved()
        ctx.counts = len(stored), len(moved)
        ctx.save_for_backward(*leaves, *call.checked, *stored, *moved, *samples)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        if torch.is_grad_enabled():
            return once(_rewind, ctx, grads, [g for g in grads if g is not None])
        return _rewind(ctx, grads)


# Function.apply without its preparations for functorch's transforms, under which there is no tape.
_apply_rewind = super(torch.autograd.Function, _Rewind).apply


def _rewind(ctx: Any, grads: Gradients) -> Gradients:
    """Invert a block, and return the gradients of all inputs of its Function."""
    call: BlockCall = ctx.call
    tape = call.tape
    now, evidence, _output = tape.pop() or _begin_here(ctx, tape)
    saved: Streams = ctx.saved_tensors
    begin = len(tape.arguments.tensors)
    end = begin + len(call.parameters)
    # One alias per place: the same tensor may be two keyword arguments, or also a parameter.
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
        seen.inputs(call.recomputed(tuple(now)))
    if call.before is not None and is_going_to_run(call.before):  # rule 4
        tape.push((now, evidence, ()))
    elif evidence is not None:
        tape.witness.judge(evidence, tuple(now))  # type: ignore[union-attr]
    return (None, *found)


def own_of(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The parameters for a second evaluation: themselves, or aliases of those that another module has computed.

    Their hooks do nothing meanwhile (`graph.gradients`): they get the whole gradient when the Function returns it. Aliases of
    all parameters would have the same effect, but another thread would find them in the module.
    """
    return [p if p.grad_fn is None else alias_of(p) for p in parameters]


def _begin_here(ctx: Any, tape: Tape) -> Entry:
    """The tape's entry for a backward pass that begins at a block with hooks, from its output (`hooked`)."""
    outputs = [reference() for reference in getattr(ctx, "outputs", ())]
    streams = [o for o in outputs if o is not None]
    if not streams or len(streams) < len(outputs):
        raise RuntimeError(
            f"a backward pass begins at block {ctx.call.position}, and not at the output of its sequence, from which blocks are "
            f"recomputed. For a loss that depends only on this block's output, let a forward hook store the whole output, a "
            f"tuple; or add `0 * y.sum()` of the sequence's output y to the loss"
        )
    if versions_of(streams) != ctx.versions:
        raise RuntimeError(
            f"the output of block {ctx.call.position} was modified by an inplace operation, and is still needed"
        )
    return tape.begin([s.detach() for s in streams])


def end(tape: Tape | None, outputs: Streams, count: int, join: int | None, stored_follow: bool = False) -> Streams:
    """End a sequence, or its recomputed part if blocks with stored activations follow.

    Of the outputs, the first `count` are streams, which are joined along the dimension `join` if that is not None. On a tape
    the output is saved. A log-determinant passes through the same Function, so that its backward pass begins there too.
    """
    if tape is not None and any(o.requires_grad for o in outputs):
        return _Anchor.apply(tape, join, stored_follow, count, *outputs)  # type: ignore[no-any-return, no-untyped-call]
    return outputs if join is None else (torch.cat(outputs[:count], join), *outputs[count:])


class _Anchor(torch.autograd.Function):
    """The end of a sequence: saves its output, and puts it on the tape when the backward pass begins."""

    @staticmethod
    def forward(ctx: Any, tape: Tape, join: int | None, stored_follow: bool, count: int, *tensors: Tensor) -> Streams:
        streams, log_det = tensors[:count], tensors[count:]
        ctx.tape, ctx.join, ctx.stored_follow = tape, join, stored_follow
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
    """Put the saved output on the tape; the gradients of its streams, and of the log-determinant if there is one."""
    saved: Streams = ctx.saved_tensors
    output: Streams = ()
    if ctx.join is None:
        streams = [s.detach() for s in saved]
        output = () if ctx.stored_follow else saved
    else:
        # Copies with the strides of the blocks' streams. So the joined output can be freed if nothing else needs it.
        parts = saved[0].split(ctx.sizes, ctx.join)
        streams = list(map(laid_out, parts, ctx.strides))
        joined = grads[0]
        split = (None,) * len(streams) if joined is None else joined.split(ctx.sizes, ctx.join)
        grads = (*split, *grads[1:])
    ctx.tape.push(ctx.tape.begin(streams, output))
    return (None, None, None, None, *grads)


def hold(lifetime: Tensor, outputs: Streams) -> Streams:
    """The outputs, with a graph that holds `lifetime` until it is freed."""
    return Hold.apply(lifetime, *outputs)  # type: ignore[no-any-return, no-untyped-call]


def is_held(tensor: Tensor) -> bool:
    """Whether it is the output of a sequence with a memory budget, whose graph holds it."""
    return isinstance(tensor.grad_fn, node_type(Hold))


class Hold(torch.autograd.Function):
    """The identity, which saves a tensor as a token of its graph's lifetime.

    The memory budget registers a finalizer on that tensor. It is called when the graph, and the activations with it, are freed.
    """

    @staticmethod
    def forward(ctx: Any, lifetime: Tensor, *tensors: Tensor) -> Streams:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(lifetime)
        return tuple([t.view_as(t) for t in tensors])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        return (None, *grads)
