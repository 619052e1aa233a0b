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

import operator
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from revflow._base.stepwise import Stepwise
from revflow._base.streams import Context, Gradients, Streams, as_streams, versions_of
from revflow._guard.chains import Evidence
from revflow._replay.arguments import Arguments
from revflow._replay.mode import refuse_compiled_autograd
from revflow._replay.random_states import Draws
from revflow._rewind.blocks import Call, Coupled, Whole
from revflow._rewind.conditioner import Given
from revflow._rewind.graph import alias_of, laid_out
from revflow._rewind.passage import Passage, is_bound, run_plainly, run_whole
from revflow._rewind.tape import Tape


class _Offer:
    """What a chain wishes of the stepwise block that it is about to call, and what the block has made of it."""

    def __init__(self, passage: Passage, position: str, block: object, streams: Streams, before: Any) -> None:
        self.passage, self.position, self.block, self.streams, self.before = passage, position, block, streams, before
        self.versions = versions_of(streams)
        self.results: Streams = ()


_thread = threading.local()


def through(
    passage: Passage, position: str, block: nn.Module, streams: Streams, before: Any, context: Context
) -> Streams:
    """Pass `streams` through the chain's block at that `position`; `before` is the autograd node of the block before it."""
    if not isinstance(block, Stepwise):
        if passage.tape is None:
            return run_whole(block, passage, streams, context)
        return _apply(Whole(passage, position, block, before, streams), streams)
    if block.unobserved:
        if passage.tape is None:
            return run_plainly(block, passage, streams, context)
        return _apply(Coupled(passage, position, block, before, streams), streams)
    return _observed(passage, position, block, streams, before, context)


def _observed(
    passage: Passage, position: str, block: Stepwise, streams: Streams, before: Any, context: Context
) -> Streams:
    """A block on which somebody has hooks is called as any module is, with an offer on the side: the Function is applied inside
    its own forward, so that its hooks see an ordinary module."""
    offer = _thread.offer = _Offer(passage, position, block, streams, before)
    try:
        call: Callable[..., object] = block.inverse if passage.inverse else block  # type: ignore[assignment, attr-defined]
        outputs = as_streams(call(*streams, **context))
    finally:
        _thread.offer = None
    if passage.tape is not None:
        _remember(offer.results, outputs)
    if is_bound(passage) and not _same(outputs, offer.results[: len(outputs)], offer.versions):
        raise RuntimeError(
            "a hook replaced its output, or called the block itself, which cannot be undone; make that a block"
        )
    return (*outputs, offer.results[-1]) if passage.log_det else outputs


def _remember(results: Streams, outputs: Streams) -> None:
    """Let a backward pass begin at this block: a hook may keep its output, and a loss be computed from that alone.

    Nothing is held: streams that the hook has not kept are gone.
    """
    node: Any = next((r.grad_fn for r in results if r.grad_fn is not None), None)
    if node is not None:
        node.outputs, node.versions = [ref(o) for o in outputs], versions_of(outputs)


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


def run_stepwise(block: Stepwise, inverse: bool, streams: Streams, context: Context) -> Streams:
    """A stepwise block's forward or inverse: as a chain that has just called it wishes, else under ordinary autograd."""
    offer: _Offer | None = getattr(_thread, "offer", None)
    if offer is None or offer.block is not block:
        return run_plainly(block, Passage(inverse, False, Arguments({}), Draws()), streams, context)
    _thread.offer = None  # whatever the block's conditioners call is no part of this chain
    passage = offer.passage
    if is_bound(passage) and not _same(streams, offer.streams, offer.versions):
        raise RuntimeError("a forward pre-hook replaced its input, which cannot be undone; make that change a block")
    if passage.tape is None:
        offer.results = run_plainly(block, passage, streams, context)
    else:
        offer.results = _apply(Coupled(passage, offer.position, block, offer.before, streams), streams)
    offer.versions = versions_of(offer.results[: len(streams)])
    return offer.results[: len(streams)]


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


def _same(streams: Streams, expected: Streams, versions: list[int]) -> bool:
    """Whether these are the expected values: the tensors themselves or aliases of them, and not changed in place."""
    return (
        len(streams) == len(expected)
        and (all(map(operator.is_, streams, expected)) or all(map(_is_alias, streams, expected)))
        and versions_of(streams) == versions
    )


def _is_alias(a: Tensor, b: Tensor) -> bool:
    """FSDP2 wraps what goes through a module in aliases."""
    return (
        a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
        and a.requires_grad == b.requires_grad
    )


def _apply(call: Call, streams: Streams) -> Streams:
    return _apply_rewind(call, *streams, *call.passage.arguments.tensors, *call.parameters)  # type: ignore[no-any-return, no-untyped-call]


class _Rewind(torch.autograd.Function):
    """A block on a tape. Where nothing needs a gradient it leaves no node: frozen leading blocks are never rewound."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor) -> Streams:
        passage = call.passage
        leaves = passage.arguments.tensors
        streams = tensors[: len(tensors) - len(leaves) - len(call.parameters)]
        witness = passage.tape.witness  # type: ignore[union-attr]
        first = call.first if passage.meter is None else partial(passage.meter.first, call)
        if witness is None or not call.foreign:
            outputs, kept = first(streams, leaves)
        else:
            with witness.remember(call):
                outputs, kept = first(streams, leaves)
        ctx.call = call
        samples: Streams = ()
        if witness is not None and any(ctx.needs_input_grad):
            samples = witness.samples(call.rebuilt(streams))
        ctx.set_materialize_grads(False)
        # All that differs from run to run: where torch.utils.checkpoint runs a chain again, of the same run as the output.
        moved = call.moved()
        ctx.counts = len(kept), len(moved)
        ctx.save_for_backward(*leaves, *call.checked, *kept, *moved, *samples)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        if torch.is_grad_enabled():
            return once(_rewind, ctx, grads, [g for g in grads if g is not None])
        return _rewind(ctx, grads)


# Without what Function.apply does for functorch's transforms: under those there is no tape.
_apply_rewind = super(torch.autograd.Function, _Rewind).apply


def _rewind(ctx: Any, grads: Gradients) -> Gradients:
    call: Call = ctx.call
    tape: Tape = call.passage.tape  # type: ignore[assignment]
    now, evidence, _output = tape.take() or _begin_here(ctx, tape)
    saved: Streams = ctx.saved_tensors
    begin = len(call.passage.arguments.tensors)
    end = begin + len(call.parameters)
    # An alias a place: a tensor may stand in the context twice, or be a parameter too.
    leaves = [*map(alias_of, saved[:begin])]
    own = own_of(call.parameters)
    kept, moved = ctx.counts
    kept_end, moved_end = end + kept, end + kept + moved
    if moved:
        call.recall(saved[kept_end:moved_end])
    call.samples = saved[moved_end:]
    needs = ctx.needs_input_grad[1:]
    seen = None if evidence is None else tape.witness.watch(evidence, call)  # type: ignore[union-attr]
    found = call.rewind(now, Given(grads, needs, leaves, own, saved[end:kept_end], seen))
    if seen is not None:
        seen.inputs(call.rebuilt(tuple(now)))
    if call.before is not None and torch._C._will_engine_execute_node(call.before):  # rule 4
        tape.leave(now, evidence)
    elif evidence is not None:
        tape.witness.judge(evidence, tuple(now))  # type: ignore[union-attr]
    return (None, *found)


def own_of(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The parameters to evaluate with: themselves, or an alias of what another module has computed.

    Their hooks keep quiet meanwhile (`_graph.gradients`): they see the whole gradient, when the Function returns it. An alias
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
    ctx.tape.leave(streams, ctx.tape.witness and ctx.tape.witness.begin(tuple(streams)), output)
    return (None, None, None, None, *grads)


def hold(mark: Tensor, streams: Streams, log_det: Tensor | None) -> tuple[Streams, Tensor | None]:
    """The streams and the log-determinant, whose graph holds on to `mark` until it is freed."""
    more = () if log_det is None else (log_det,)
    held: Streams = _Hold.apply(mark, *streams, *more)  # type: ignore[no-untyped-call]
    return (held, None) if log_det is None else (held[:-1], held[-1])


class _Hold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mark: Tensor, *tensors: Tensor) -> Streams:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mark)
        return tuple([t.view_as(t) for t in tensors])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        return (None, *grads)


def once(
    backward: Callable[[Any, Gradients], Gradients], ctx: Any, grads: Gradients, connected: Sequence[Tensor]
) -> Gradients:
    """Call `backward`, where a graph is asked for, without one: its gradients can be used, but not differentiated.

    `connected` leads to the chain's output, and so to all that a second derivative could be asked for.
    """
    with torch.no_grad():
        found = backward(ctx, grads)
    return tuple(None if g is None else _SecondDerivative.apply(g, *connected) for g in found)  # type: ignore[no-untyped-call]


class _SecondDerivative(torch.autograd.Function):
    """The identity, which refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *connected: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise RuntimeError(
            "a ReversibleSequence or ReversibleRecurrence cannot be differentiated twice: it keeps no graph. Within "
            "`with revflow.ordinary_autograd():` the same network can"
        )
