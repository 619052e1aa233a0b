"""The guard of recurrences: it compares the values that a cell returned in the forward pass with those of its second evaluation.

The backward pass has the states that the forward pass stored, and compares them with those of the second evaluation. Of the
streams that leave a time step, the forward pass stores a few values. All is compared once, at the end of the backward pass. An
error in a cell's `mix`, which changes streams within a time step, appears in the states of the cells above.

If the states of a time step were not stored but recomputed, they have the same error as the second evaluation. The error then
appears in the streams that leave the time step, or in the next stored states. So the message may name another cell than the one
at fault.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from revflow._base.streams import Tensors
from revflow._base.torch_private import FakeTensor
from revflow._guard.escapes import SecondRecorder, refuse_escapes
from revflow._guard.missing_gradients import refuse_missing_gradients
from revflow._guard.policy import Guard
from revflow._guard.precision import tolerance_of
from revflow._guard.sequences import witness_of
from revflow._guard.tolerance import LOW_PRECISION, Tolerance
from revflow._replay.arguments import Arguments
from revflow._replay.replay import Replay


class Found(NamedTuple):
    """Values that a cell returned in the forward pass, and in its second evaluation."""

    cell: str
    before: Tensors
    again: Tensors
    tolerance: Tolerance


class Watch:
    """The guard of one time step.

    Args:
        rounded: whether states are stored with fewer digits than they are computed with.
    """

    def __init__(self, guard: Guard, rounded: bool) -> None:
        self._guard, self._rounded = guard, rounded
        self._witness = witness_of(guard)
        self._leaving: Tensors = ()
        """Values of the streams that left the time step in the forward pass."""

    def see(self, streams: Tensors) -> Tensors:
        """Values of the streams that leave the time step in the forward pass, for autograd to save."""
        return () if self._witness is None else self._witness.samples(streams)

    def recall(self, leaving: Tensors) -> None:
        """Take back the values that `see` returned."""
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
        """Add the values of a cell to `found`, to be compared at the end of the pass.

        Args:
            before: the state and memory that the cell returned in the forward pass.
            again: the same, of the second evaluation.
            leaving: the streams that leave the time step in the second evaluation, if this is the last cell.
        """
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
        """Refuse a cell whose outputs depend on a tensor which the engine does not pass."""
        if self._witness is not None:
            refuse_missing_gradients(cell, outputs, inputs, module, arguments)

    def remember(self, cell: str, replay: Replay) -> AbstractContextManager[Any, Any]:
        """A mode that records the tensors of a cell's first evaluation; an empty context if it is not followed closely."""
        if self._witness is None or not self._guard.close_looks.choose(cell, replay):
            return nullcontext()
        return self._guard.close_looks.remember()

    def follow(self, replay: Replay) -> SecondRecorder | None:
        """A mode that records the tensors of a second evaluation; None if it is not followed closely."""
        return self._guard.close_looks.follow(replay)

    def escaped(self, cell: str, followed: SecondRecorder | None, attributes: Sequence[str]) -> None:
        """Refuse tensors that left the cell by another way than its result."""
        if self._witness is not None:
            refuse_escapes(cell, followed, attributes)


def judge(guard: Guard, found: list[Found]) -> None:
    """Compare at the end of the pass. Errors are relative to the largest value of the forward pass among those compared.

    Of several errors, the message names the first one in the order of the forward pass: it may have caused the others.
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
        return  # standard autograd has no gradients then either
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
        f"{cell.cell}: its second evaluation, in the backward pass, gave another result than the forward pass, with an error of "
        f"{error:.1e} relative to the largest state. The guard warns from {cell.tolerance.warn:.0e} and raises from "
        f"{cell.tolerance.error:.0e}. The cell may use random numbers that are not torch's, state outside of parameters and "
        f"buffers, or an operation that is not deterministic (try torch.use_deterministic_algorithms(True))."
    )
