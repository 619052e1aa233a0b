"""The passes through a group of blocks: forward, and backward by inversion and recomputation.

PyTorch traces them with all operations of `torch.autograd.grad`, and compiles only these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from revflow._base.streams import Context, Streams, rotate
from revflow._captured.call import Call
from revflow._captured.groups import Group, Step
from revflow._captured.tensors import holding
from revflow._replay.autocast import autocast
from revflow._rewind.laws import Law
from revflow._rewind.plain import call_whole, total

Found = Sequence[Tensor | None]
"""Gradients; None for those that are zero, or not needed."""

Selected = dict[int, Tensor]
"""Leaves, whose gradients are needed, by their places among the tensors that are not streams."""


def forward(call: Call, group: Group, *tensors: Tensor) -> list[Tensor]:
    """The streams after the group, its log-determinant, the streams to store, and its buffers' new values.

    `tensors` are the streams, those among the keyword arguments, and those of the group.
    """
    rest = iter(tensors)
    now = [*islice(rest, group.widths[0])]
    leaves = [*islice(rest, len(call.names))]
    own = [t.clone() if k in group.moving else t for k, t in enumerate(rest)]
    context = call.context(leaves)
    log_dets: list[Tensor] = []
    stored: list[Tensor] = []
    with autocast([*call.autocast], now[0].device):
        for step in group.steps:
            with holding(step.block, step.holders, [own[k] for k in step.places]):
                if step.law is None:
                    outputs = call_whole(step.block, call.passage.direction, call.passage.log_det, tuple(now), context)
                    count = len(outputs) - call.passage.log_det
                    now, log_dets = [*outputs[:count]], [*log_dets, *outputs[count:]]
                    continue
                now = rotate(now, step.law.rotations[0])
                for k, conditioner in step.conditioners:
                    x = now[k]
                    t = step.block.evaluate(conditioner, x, _without(now, k), context)
                    now[k] = step.law.apply(x, *t)
                    log_dets += [step.law.log_det(x, now[k], t)] if call.passage.log_det else []
                    stored += [x] if step.law.stores_target else []
                now = rotate(now, step.law.rotations[1])
    log_det = [total(log_dets, now[0])] if call.passage.log_det else []
    return [*map(dense, now), *log_det, *stored, *[own[k] for k in group.moving]]


def backward(call: Call, group: Group, needs: Sequence[bool], *tensors: Tensor) -> list[Tensor | None]:
    """The streams before the group, and the gradients of them, of the keyword arguments and of the group's fixed tensors.

    `tensors` are the streams after the group, their gradients, the log-determinant's gradient, the stored streams, the tensors
    among the keyword arguments, and those of the group. `needs` states which of the last two require a gradient.
    """
    rewind = _Rewind(call, group, needs, tensors)
    with torch.no_grad(), autocast([*call.autocast], tensors[0].device):
        for step in reversed(group.steps):
            rewind.step(step)
    return [*map(dense, rewind.now), *map(dense, rewind.its), *rewind.sums.values()]


class _Rewind:
    """The state of a backward pass through a group."""

    def __init__(self, call: Call, group: Group, needs: Sequence[bool], tensors: Sequence[Tensor]) -> None:
        self._call, self._count, rest = call, len(call.names), iter(tensors)
        self.now = [*islice(rest, group.widths[1])]
        self.its = [*islice(rest, group.widths[1])]
        """Their gradients."""
        self._of_log_det = [*islice(rest, call.passage.log_det)]
        self._stored = [*islice(rest, group.stores)]
        places = [*range(self._count), *[self._count + k for k in group.fixed]]
        self._given = dict(zip(places, rest, strict=True))
        """The tensors among the keyword arguments, then those of the group."""
        self._needs = dict(zip(places, needs, strict=True))
        self.sums: dict[int, Tensor | None] = dict.fromkeys(places)
        """Their gradients; None for those that are zero, or not needed."""

    def step(self, step: Step) -> None:
        """Invert the step, and add its gradients."""
        own = [self._count + k for k in step.places]
        used = [k for k in self._given if k < self._count or k in own]
        tensors = {k: _leaf(self._given[k]) if self._needs[k] else self._given[k] for k in used}
        selected = {k: t for k, t in tensors.items() if self._needs[k]}
        context = self._call.context([tensors[k] for k in range(self._count)])
        # A buffer that an evaluation changes, a statistic of BatchNorm, is None here: it must not move again.
        with holding(step.block, step.holders, [tensors.get(k) for k in own]):
            if step.law is None:
                self._invert_block(step.block, selected, context)
                return
            before, after = step.law.rotations
            self.now, self.its = rotate(self.now, -after), rotate(self.its, -after)
            for k, conditioner in reversed(step.conditioners):
                self._invert_change(step.law, k, partial(step.block.evaluate, conditioner), selected, context)
            self.now, self.its = rotate(self.now, -before), rotate(self.its, -before)

    def _invert_change(
        self, law: Law, k: int, evaluate: Callable[..., Streams], selected: Selected, context: Context
    ) -> None:
        """The same for one conditioner of a coupling, which changes stream k."""
        y, others = self.now[k], [*map(_leaf, _without(self.now, k))]
        with torch.enable_grad():
            t = evaluate(y, others, context)
        values = [c.detach() for c in t]
        x = self.now[k] = self._stored.pop() if law.stores_target else law.undo(y, *values)
        if law.translates:
            of_t: Found = [self.its[k] if law.direction.sign > 0 else -self.its[k]]
        else:
            leaves = [*map(_leaf, (x, *values))]
            with torch.enable_grad():
                changed = law.apply(*leaves)
                log_det = [law.log_det(leaves[0], changed, tuple(leaves[1:]))] if self._of_log_det else []
            of_x, *of_t = _gradients([changed, *log_det], [self.its[k], *self._of_log_det], leaves)
            self.its[k] = torch.zeros_like(x) if of_x is None else of_x
        of_others = self._add(t, of_t, others, selected)
        rest = [j for j in range(len(self.its)) if j != k]
        for j, gradient in zip(rest, of_others, strict=True):
            self.its[j] = self.its[j] if gradient is None else self.its[j] + gradient

    def _invert_block(self, block: Any, selected: Selected, context: Context) -> None:
        """The same for a block that is not a coupling, by its own inverse."""
        passage = self._call.passage
        undo = block.inverse if passage.direction.sign > 0 else block
        streams = [*map(_leaf, undo(*self.now, **context))]
        with torch.enable_grad():
            outputs = call_whole(block, passage.direction, passage.log_det, tuple(streams), context)
        found = self._add(outputs, [*self.its, *self._of_log_det], streams, selected)
        self.now = [s.detach() for s in streams]
        self.its = [torch.zeros_like(s) if g is None else g for s, g in zip(streams, found, strict=True)]

    def _add(self, outputs: Streams, of_outputs: Found, streams: list[Tensor], selected: Selected) -> Found:
        """Add the gradients of the selected tensors to the sums, and return those of the streams."""
        found = _gradients(outputs, of_outputs, [*streams, *selected.values()])
        for k, gradient in zip(selected, found[len(streams) :], strict=True):
            self.sums[k] = summed(self.sums[k], gradient)
        return found[: len(streams)]


def _gradients(outputs: Sequence[Tensor], of_outputs: Found, inputs: Sequence[Tensor]) -> list[Tensor | None]:
    known = [(o, g) for o, g in zip(outputs, of_outputs, strict=True) if g is not None and o.requires_grad]
    if not known:
        return [None] * len(inputs)
    outputs, of_outputs = zip(*known, strict=True)
    return [*torch.autograd.grad(outputs, inputs, of_outputs, allow_unused=True)]


def dense(tensor: Tensor) -> Tensor:
    """The tensor, in a layout without gaps: groups of blocks that are compiled once get streams of one layout."""
    by_channels = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim(), torch.contiguous_format)
    return tensor if tensor.is_contiguous(memory_format=by_channels) else tensor.contiguous()


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def summed(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum of two gradients of the same tensor."""
    return b if a is None else a if b is None else a + b


def _without(items: Sequence[Tensor], k: int) -> Streams:
    return tuple([item for i, item in enumerate(items) if i != k])
