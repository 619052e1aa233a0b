"""A sequence as one autograd Function, of which torch.compile compiles both passes.

The eager engine cannot be compiled: it reads random states, counts versions, and stores its tape on Python objects. Here, all
that is decided while PyTorch traces the call, and only tensor operations remain.
"""

from __future__ import annotations

from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from revflow._base.streams import Gradients, Streams
from revflow._base.torch_capture import call_uninlined
from revflow._captured import passes, region
from revflow._captured.call import Call, registered
from revflow._captured.groups import groups_of
from revflow._captured.passes import dense, summed
from revflow._rewind.plain import total


class Captured(torch.autograd.Function):
    """All blocks of a call. It saves the output, the streams that couplings declare as ill-conditioned, and its arguments.

    The arguments are the number of the call, the streams, the tensors among the keyword arguments, and those of the blocks. It
    returns the output, the log-determinant if that is computed, and the new values of buffers that the blocks change.
    """

    @staticmethod
    def forward(ctx: Any, number: int, *tensors: Tensor) -> Streams:
        call = registered(number)
        streams, leaves, own = call.split(tensors)
        groups = groups_of(call)
        now = [*map(dense, streams)]
        log_dets: list[Tensor] = []
        stored: list[Tensor] = []
        moved: list[Tensor] = []
        for group in groups:
            operands = [*now, *leaves, *[own[k] for k in group.tensors]]
            results: Any = iter(
                region.call(("forward", group.kind, call.kind), partial(passes.forward, call, group), operands)
            )
            now = [*islice(results, group.widths[1])]
            log_dets += islice(results, call.passage.log_det)
            stored += islice(results, group.stores)
            moved += results
        outputs = tuple(now) if call.join is None else (torch.cat(now, call.join),)
        ctx.call, ctx.groups, ctx.needs = call, groups, ctx.needs_input_grad[1 + len(streams) :]
        ctx.sizes = None if call.join is None else [s.shape[call.join] for s in now]
        ctx.counts = len(outputs), len(stored)
        kept = [None if k in call.moved else t for k, t in enumerate(own)]
        ctx.save_for_backward(*outputs, *stored, *leaves, *kept)
        ctx.mark_non_differentiable(*moved)
        return (*outputs, *([total(log_dets, now[0])] if call.passage.log_det else []), *moved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        call: Call = ctx.call
        saved = iter(ctx.saved_tensors)
        outputs, stored = ([*islice(saved, count)] for count in ctx.counts)
        given = [*saved]
        now, its, of_log_det = (
            [separate(o, grads[0]) for o in outputs],
            [*grads[: len(outputs)]],
            [*grads[len(outputs) :][: call.passage.log_det]],
        )
        if call.join is not None:
            now, its = [*now[0].split(ctx.sizes, call.join)], [*its[0].split(ctx.sizes, call.join)]
        now, its = [*map(dense, now)], [*map(dense, its)]
        sums: list[Tensor | None] = [None] * len(given)
        for group in reversed(ctx.groups):
            its_stored, stored = stored[len(stored) - group.stores :], stored[: len(stored) - group.stores]
            leaves = len(call.names)
            places = [*range(leaves), *[leaves + group.tensors[k] for k in group.fixed]]
            needs = [ctx.needs[k] for k in places]
            key = "backward", group.kind, call.kind, tuple(needs)
            operands = [*now, *its, *of_log_det, *its_stored, *[given[k] for k in places]]
            results: Any = iter(region.call(key, partial(passes.backward, call, group, needs), operands))
            now, its = [*islice(results, group.widths[0])], [*islice(results, group.widths[0])]
            for k, gradient in zip(places, results, strict=True):
                sums[k] = summed(sums[k], gradient)
        return None, *its, *sums


@call_uninlined
def run(number: int, *tensors: Tensor) -> Streams | Tensor:
    """The results of the call with this number, in a tuple if there are several. See `Captured`.

    With a tuple of one tensor, DistributedDataParallel's split of a graph into buckets fails.
    """
    results: Streams = Captured.apply(number, *tensors)  # type: ignore[no-untyped-call]
    return results if len(results) > 1 else results[0]


@torch.library.custom_op("revflow::separate", mutates_args=())
def separate(x: Tensor, gradient: Tensor) -> Tensor:
    """A copy that the graph's compiler cannot see through, and cannot move into the forward pass.

    Otherwise, it would recognize the streams in the output, and store them next to it.
    """
    return x.clone()


@separate.register_fake
def _(x: Tensor, gradient: Tensor) -> Tensor:
    return torch.empty_like(x)
