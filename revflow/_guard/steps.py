"""Does a cell of a recurrence return the same when the backward pass evaluates it again?

The states that the forward pass left are there in the backward pass, so they are compared with what the second evaluation
makes of them; of the streams that leave a step a few values are kept. All is compared once, when the backward pass is
through. What a cell's `mix` does to the streams within a step shows in the states of the cells above it. Where the states of a
step were computed again they may err as the second evaluation does: then only the streams that leave the step tell, or the
next states that were kept, and the cell that is named need not be the one at fault.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from revflow._base.torch_private import FakeTensor
from revflow._guard.chains import witness_of
from revflow._guard.escapes import Made, refuse_escapes
from revflow._guard.policy import Guard
from revflow._guard.tolerance import LOW_PRECISION, Tolerance, tolerance_of
from revflow._guard.unregistered import refuse_strangers
from revflow._replay.arguments import Arguments
from revflow._replay.replay import Replay

Tensors = tuple[Tensor, ...]


class Found(NamedTuple):
    """Values that a cell returned in the forward pass, and in its second evaluation."""

    cell: str
    before: Tensors
    again: Tensors
    tolerance: Tolerance


class Watch:
    """Watches one step.

    Args:
        rounded: whether states are kept with fewer digits than they are computed with.
    """

    def __init__(self, guard: Guard, rounded: bool) -> None:
        self._guard, self._rounded = guard, rounded
        self._witness = witness_of(guard)
        self._leaving: Tensors = ()
        """Of the streams that left the step."""

    def see(self, streams: Tensors) -> Tensors:
        """Values of the streams that leave the step in the forward pass, for autograd to save."""
        return () if self._witness is None else self._witness.samples(streams)

    def recall(self, leaving: Tensors) -> None:
        """What `see` returned."""
        self._leaving = leaving

    def look(
        self,
        found: dict[Guard, list[Found]],
        cell: str,
        replay: Replay,
        before: Tensors,
        again: Tensors,
        leaving: Tensors | None,
    ) -> None:
        """At the state and memory that a cell returned `before`, and `again` in its second evaluation, and at the streams that
        leave the step now, if this is the last cell."""
        if self._witness is None:
            return
        first, second = self._witness.samples(before), self._witness.samples(again)
        if leaving is not None:
            first, second = first + self._leaving, second + self._witness.samples(leaving)
        tolerance = LOW_PRECISION if self._rounded else tolerance_of(again, (replay,))
        found.setdefault(self._guard, []).append(Found(cell, first, second, tolerance))

    def graph(
        self, cell: str, outputs: Tensors, inputs: Sequence[Tensor], module: nn.Module, arguments: Arguments
    ) -> None:
        """Refuse a cell whose outputs depend on what the engine does not know of."""
        if self._witness is not None:
            refuse_strangers(cell, outputs, inputs, module, arguments)

    def remember(self, cell: str, replay: Replay) -> AbstractContextManager[Any, Any]:
        """Notes what a cell's first evaluation makes, if that is to be looked at closely."""
        if self._witness is None or not self._guard.choose(cell, replay):
            return nullcontext()
        return self._guard.remember()

    def follow(self, replay: Replay) -> Made | None:
        """Notes what an evaluation makes, if that is to be looked at closely."""
        return self._guard.follow(replay)

    def escaped(self, cell: str, followed: Made | None, attributes: Sequence[str]) -> None:
        """What has left the cell by another way than its result."""
        if self._witness is not None:
            refuse_escapes(cell, followed, attributes)


def judge(guard: Guard, found: list[Found]) -> None:
    """Compare, once the pass is through. Errors are relative to the largest value that was seen in the forward pass.

    Of several errors the first one in the order of the forward pass is named: it may have led to the others.
    """
    found = found[::-1]
    before = [sample for cell in found for sample in cell.before]
    again = [sample for cell in found for sample in cell.again]
    if not before or isinstance(before[0], FakeTensor) or before[0].is_meta:
        return
    home = before[0].device
    a, b = (torch.stack([s.to(home) for s in samples]) for samples in (before, again))
    errors, sizes = torch.stack(((b - a).abs().amax(1), a.abs().amax(1))).tolist()
    largest = max(sizes) or 1.0
    if not all(map(math.isfinite, sizes)):
        return  # ordinary autograd has no gradients then either
    message = ""
    for cell in found:
        worst = max(e if math.isfinite(e) else math.inf for e in [*errors[: len(cell.before)], 0.0]) / largest
        del errors[: len(cell.before)]
        if worst > cell.tolerance.error:
            guard.report(_message(cell, worst), True)
        if worst > cell.tolerance.warn and not message:
            message = _message(cell, worst)
    if message:
        guard.report(message, False)


def _message(cell: Found, error: float) -> str:
    return (
        f"{cell.cell}: the backward pass evaluated it again and found another result than the forward pass, with an error of "
        f"{error:.1e} relative to the largest state; the guard warns from {cell.tolerance.warn:.0e} and raises from "
        f"{cell.tolerance.error:.0e}. It uses random numbers from elsewhere than torch, state outside of parameters and buffers, "
        f"or an operation that does not repeat (try torch.use_deterministic_algorithms(True))."
    )
