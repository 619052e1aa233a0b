"""A sequence as one autograd Function of which torch.compile captures both passes.

The eager engine cannot be captured: it reads random states, counts versions, and stores its tape on Python objects. Here, all
that is decided while PyTorch traces the call, and only tensor operations remain. The backward pass inverts each block, and pulls
the gradients back through its conditioners by `torch.func.vjp`, which PyTorch can trace. The graph's compiler then removes the
cost per block, and fuses the inversion with the evaluations.

Only sequences to which `survey.survey` has no objection run here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from revflow._base.streams import Context, Streams, rotate
from revflow._base.torch_capture import CAN_BE_CAPTURED, break_graph, pullback, reparametrized
from revflow._captured.call import Call, Part, prepared, split
from revflow._captured.survey import OUTSIDE, survey
from revflow._rewind.block_list import BlockList, flattened
from revflow._rewind.chain import streams_of
from revflow._rewind.direction import Direction
from revflow._rewind.passage import Passage
from revflow._rewind.plain import call_whole, total


def captured(
    sequence: BlockList, x: Tensor | Streams, split_dim: int, direction: Direction, log_det: bool, context: Context
) -> tuple[Any, Tensor | None] | None:
    """The output of a sequence, as a part of the graph that PyTorch traces, and the log-determinant if that is computed.

    None if that is not possible. The graph then ends before this call, which is an error with `fullgraph=True`.
    """
    if not CAN_BE_CAPTURED:
        return None
    passage = Passage(direction, log_det=log_det)
    streams, join = streams_of(x, split_dim), split_dim if isinstance(x, Tensor) else None
    found = survey(sequence, passage, streams, context)
    if found.objection:
        break_graph(OUTSIDE.format(found.objection))
        return None
    blocks = [block for _, block in flattened(sequence)][:: passage.direction.sign]
    call, arguments = prepared(blocks, passage, join, streams, context, found)
    tensors = (*streams, *arguments.leaves, *arguments.parameters, *arguments.buffers)
    results: Streams = _Captured.apply(call, *tensors)  # type: ignore[no-untyped-call]
    count = len(results) - len(arguments.buffers)
    for buffer, value in zip(arguments.buffers, results[count:], strict=True):
        buffer.copy_(value)
    outputs, total_log_det = (results[: count - 1], results[count - 1]) if log_det else (results[:count], None)
    return (outputs if join is None else outputs[0]), total_log_det


class Inputs(NamedTuple):
    """The inputs of an inversion, besides the streams and their gradients."""

    leaves: Streams
    """The tensors among the keyword arguments."""
    own: list[Tensor]
    """The parameters."""
    stored: Tensor | None
    """The stream before the change, if the forward pass stored it."""
    of_log_det: list[Tensor]
    """The log-determinant's gradient, if there is one."""


class _Captured(torch.autograd.Function):
    """All blocks of a call. It saves the output, the streams that couplings declare as ill-conditioned, and its arguments.

    The arguments are the streams, the tensors among the keyword arguments, the parameters, and the buffers that evaluations
    change. It returns the output, the log-determinant if that is computed, and those buffers' new values.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor) -> Streams:
        given, leaves, own, buffers = split(call, tensors)
        now: list[Tensor] = [*given]
        log_dets: list[Tensor] = []
        anchors: list[Tensor] = []
        moved: list[Tensor] = []
        with _autocast(call):
            for step in call.steps:
                now = rotate(now, step.rotations[0])
                for part in step.parts:
                    copies = [b.clone() for b in buffers[part.buffers]]
                    context = _filled(call, leaves)
                    log_det: Sequence[Tensor]
                    if part.law is None:
                        result = _whole(call, part, now, [own[i] for i in part.own], copies, context)
                        now, log_det = [*result[: call.width]], result[call.width :]
                    else:
                        k = part.target
                        if part.law.stores_target:
                            anchors.append(now[k].clone())
                        t = _evaluated(part, now[k], _without(now, k), [own[i] for i in part.own], copies, context)
                        now[k], *log_det = _changed(call, part, now[k], t)
                    log_dets += log_det
                    moved += copies
                now = rotate(now, step.rotations[1])
        outputs = tuple(now) if call.join is None else (torch.cat(now, call.join),)
        ctx.call, ctx.sizes = call, [] if call.join is None else [s.shape[call.join] for s in now]
        ctx.anchors, ctx.outputs = len(anchors), len(outputs)
        ctx.save_for_backward(*outputs, *anchors, *leaves, *own)
        ctx.mark_non_differentiable(*moved)
        return (*outputs, *([total(log_dets, now[0])] if call.passage.log_det else []), *moved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        call: Call = ctx.call
        saved = ctx.saved_tensors
        outputs, anchors = saved[: ctx.outputs], [*saved[ctx.outputs : ctx.outputs + ctx.anchors]]
        _, leaves, own, _ = split(call, (None,) * call.width + saved[ctx.outputs + ctx.anchors :])
        of_log_det = [grads[ctx.outputs]] if call.passage.log_det else []
        now, its = [_separate(o, grads[0]) for o in outputs], [*grads[: ctx.outputs]]
        if call.join is not None:
            now, its = [*now[0].split(ctx.sizes, call.join)], [*its[0].split(ctx.sizes, call.join)]
        of_own: list[Tensor | None] = [None] * len(own)
        of_leaves: list[Tensor | None] = [None] * len(leaves)
        with _autocast(call):
            for step in reversed(call.steps):
                now, its = rotate(now, -step.rotations[1]), rotate(its, -step.rotations[1])
                for part in reversed(step.parts):
                    rewind = _rewind_whole if part.law is None else _rewind
                    stored = anchors.pop() if part.law is not None and part.law.stores_target else None
                    given = Inputs(leaves, [own[i] for i in part.own], stored, of_log_det)
                    now, its, more, found = rewind(call, part, now, its, given)
                    of_leaves = _summed(of_leaves, more)
                    for i, gradient in zip(part.own, found, strict=True):
                        (of_own[i],) = _summed([of_own[i]], [gradient])
                now, its = rotate(now, -step.rotations[0]), rotate(its, -step.rotations[0])
        return None, *its, *of_leaves, *of_own, *[None] * call.buffers


def _rewind(call: Call, part: Part, now: list[Tensor], its: list[Tensor], given: Inputs) -> Any:
    """Undo a conditioner's change of `now`, whose gradients are `its`.

    Returns both as they are before the change, and the gradients of the tensors among the arguments and of the parameters.
    """
    k, law = part.target, part.law
    y, others = now[k], _without(now, k)

    def evaluate(others: Streams, its_leaves: Streams, its_own: Streams) -> Streams:
        context = _filled(call, _merged(call.needs, its_leaves, given.leaves))
        return _evaluated(part, y, others, _merged(part.needs, its_own, given.own), part.unmoved, context)

    t, pull = pullback(evaluate, others, _chosen(call.needs, given.leaves), _chosen(part.needs, given.own))
    x = law.undo(y, *t) if given.stored is None else given.stored
    of_x = its[k]
    if law.translates:
        of_t = (of_x if law.direction.sign > 0 else -of_x,)
    else:
        _, pull_change = pullback(lambda x, *t: _changed(call, part, x, t), x, *t)
        of_x, *of_t = pull_change((of_x, *given.of_log_det))
    of_others, of_leaves, of_own = pull(tuple(of_t))
    summed = [g + more for g, more in zip(_without(its, k), of_others, strict=True)]
    now, its = [*others[:k], x, *others[k:]], [*summed[:k], of_x, *summed[k:]]
    return now, its, _spread(call.needs, of_leaves), _spread(part.needs, of_own)


def _rewind_whole(call: Call, part: Part, now: list[Tensor], its: list[Tensor], given: Inputs) -> Any:
    """The same of a block that is not a coupling: its inversion, and a further evaluation for the gradients."""
    undo = part.block.inverse if call.passage.direction.sign > 0 else part.block
    with _parameters_of(part, given.own, part.unmoved):
        before = tuple(undo(*now, **_filled(call, given.leaves)))

    def run(streams: Streams, its_leaves: Streams, its_own: Streams) -> Streams:
        context = _filled(call, _merged(call.needs, its_leaves, given.leaves))
        return _whole(call, part, streams, _merged(part.needs, its_own, given.own), part.unmoved, context)

    _, pull = pullback(run, before, _chosen(call.needs, given.leaves), _chosen(part.needs, given.own))
    of_streams, of_leaves, of_own = pull((*its, *given.of_log_det))
    return [*before], [*of_streams], _spread(call.needs, of_leaves), _spread(part.needs, of_own)


def _evaluated(
    part: Part, target: Tensor, others: Sequence[Tensor], own: Any, buffers: Sequence[Tensor | None], context: Context
) -> Streams:
    """The coefficients that a conditioner with these parameters computes. It changes the `buffers`."""
    with _parameters_of(part, own, buffers):
        return part.block.evaluate(part.module, target, others, context)  # type: ignore[no-any-return]


def _changed(call: Call, part: Part, x: Tensor, t: Streams) -> Streams:
    """The stream x, changed with these coefficients, and the log-determinant if that is computed."""
    y = part.law.apply(x, *t)
    return (y, part.law.log_det(x, y, t)) if call.passage.log_det else (y,)


def _whole(
    call: Call, part: Part, streams: Sequence[Tensor], own: Any, buffers: Sequence[Tensor | None], context: Context
) -> Streams:
    """The output of a block that is not a coupling, and its log-determinant if that is computed."""
    with _parameters_of(part, own, buffers):
        return call_whole(part.block, call.passage.direction, call.passage.log_det, tuple(streams), context)


def _parameters_of(part: Part, own: Sequence[Tensor], buffers: Sequence[Tensor | None]) -> Any:
    """A context in which the module has these parameters and buffers."""
    return reparametrized(part.module, dict(zip((*part.names, *part.moving), (*own, *buffers), strict=True)))


def _filled(call: Call, leaves: Sequence[Tensor]) -> Context:
    """The keyword arguments, with these tensors."""
    return call.others | dict(zip(call.names, leaves, strict=True))


def _without(items: Sequence[Tensor], k: int) -> Streams:
    return tuple([item for i, item in enumerate(items) if i != k])


def _chosen(needs: Sequence[bool], tensors: Sequence[Tensor]) -> Streams:
    """Those that require a gradient."""
    return tuple([t for t, need in zip(tensors, needs, strict=True) if need])


def _merged(needs: Sequence[bool], chosen: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, with the chosen ones in their places."""
    rest = iter(chosen)
    return [next(rest) if need else t for t, need in zip(tensors, needs, strict=True)]


def _spread(needs: Sequence[bool], found: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients that were found, with None in the places of the others."""
    rest = iter(found)
    return [next(rest) if need else None for need in needs]


def _summed(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [y if x is None else x if y is None else x + y for x, y in zip(a, b, strict=True)]


def _autocast(call: Call) -> Any:
    kind, enabled, dtype = call.autocast
    return torch.autocast(kind, enabled=enabled, dtype=dtype, cache_enabled=False)


@torch.library.custom_op("revflow::separate", mutates_args=())
def _separate(x: Tensor, gradient: Tensor) -> Tensor:
    """A copy that the graph's compiler cannot see through, and cannot move into the forward pass.

    Otherwise it would recognize that the second evaluation of a conditioner computes the same as the first, keep the values of
    the first, and so store all activations. Of the backward pass, the inversion does not depend on a gradient. Without this
    argument, the compiler could begin it in the forward pass, and store recomputed streams next to the output.
    """
    return x.clone()


@_separate.register_fake
def _(x: Tensor, gradient: Tensor) -> Tensor:
    return torch.empty_like(x)
