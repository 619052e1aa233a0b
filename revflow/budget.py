"""The memory budget: how much memory activations may take, and the plan that follows from it.

The costs of the blocks are measured once for each kind of input, in the first training step, which recomputes all blocks. The
forward pass of each block then runs with a graph, whose saved tensors are counted and dropped. The peak of every plan is
computed from these bytes (`_budget.costs`, `_budget.selection`); no further step is run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from revflow._base.memory_size import MemoryBudget, size
from revflow._budget.costs import Cost
from revflow._budget.keeper import Keeper


class Budget:
    """A memory budget that several sequences and recurrences share.

    The budget limits the activations of all of them together over one training step. A step begins when no call is pending, that
    is, when every graph has been freed. The first step recomputes everything, and measures the costs of each call. Later steps
    with the same order of calls store what saves the most time per byte. From the point where a step differs from all earlier
    ones, its calls recompute everything, and the new order is remembered.

    Args:
        memory: Memory for activations, as the `memory_budget` of a `ReversibleSequence`: bytes, a size such as "24GiB", a
            fraction of the device's free memory at the first call, "min" or "max".
        warn: Whether to warn, once, if a training step exceeds the budget even though everything is recomputed.

    Raises:
        TypeError, ValueError: If `memory` is not a memory budget.

    Examples:
        >>> budget = revflow.Budget("24GiB")
        >>> blocks = lambda: [revflow.AdditiveCoupling(torch.nn.Linear(4, 4)) for _ in range(8)]
        >>> encoder = revflow.ReversibleSequence(blocks(), memory_budget=budget)
        >>> decoder = revflow.ReversibleSequence(blocks(), memory_budget=budget)
        >>> decoder(encoder(torch.randn(2, 8))).sum().backward()
        >>> len(budget.plan.calls)
        2
    """

    def __init__(self, memory: MemoryBudget, *, warn: bool = True) -> None:
        self._keeper = Keeper(memory, warn)

    @property
    def memory(self) -> MemoryBudget:
        """The amount of memory as it was given."""
        return self._keeper.given

    @property
    def plan(self) -> StepPlan | None:
        """The plan of the longest training step so far; None before the first one, and for the budgets "min" and "max"."""
        step = self._keeper.step
        if step is None:
            return None
        limit, calls, plan = step
        work = sum(menu.work for _, menu, _ in calls)
        planned = []
        for label, menu, option in calls:
            stored, outputs, units = menu.parts(option.choice)
            share = menu.work / work if work else 0.0
            planned.append(PlannedCall(label, menu.unit, units, stored, outputs, option.held, share))
        again = sum(menu.again for _, menu, _ in calls) - plan.spared
        ratio = 1 + again / (3 * work) if work else 1.0  # The backward pass is counted as two forward passes.
        return StepPlan(limit, tuple(planned), plan.peak, ratio)

    def state_dict(self) -> dict[str, Any]:
        """Return the limit in bytes, the measured costs and the orders of calls, as plain values for a checkpoint."""
        return self._keeper.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the plans of `state_dict`, so that the first step already follows them.

        A limit in bytes that was passed to the constructor is not replaced.
        """
        self._keeper.load(state_dict)

    def __repr__(self) -> str:
        return f"Budget({self.memory!r})"


class Budgeted:
    """A module with a memory budget of its own, or a shared one."""

    _memory_budget: MemoryBudget | Budget
    _keeper: Keeper

    @property
    def memory_budget(self) -> MemoryBudget | Budget:
        """The memory budget as it was given. Assigning a new budget discards the measurements."""
        return self._memory_budget

    @memory_budget.setter
    def memory_budget(self, budget: MemoryBudget | Budget) -> None:
        self._keeper = budget._keeper if isinstance(budget, Budget) else Keeper(budget)  # which refuses a wrong value
        self._memory_budget = budget


class PlannedCall(NamedTuple):
    """One call in the plan of a training step."""

    name: str
    """Kind of call, such as "forward, 8 blocks"."""
    unit: str
    """Name of a part of the call: "block" of a sequence, "cell" of a recurrence."""
    units: int
    """Number of parts."""
    stored: int
    """Number of parts whose activations are stored."""
    outputs_stored: int
    """Number of recomputed parts whose conditioners' outputs are stored."""
    held: int
    """Bytes that the call holds until its backward pass."""
    share: float
    """Share of the step's work, from 0 to 1."""


@dataclass(frozen=True, repr=False)
class StepPlan:
    """The plan of a training step under a shared `Budget`.

    `print(plan)` prints a table.

    Examples:
        >>> budget = revflow.Budget("1GiB")
        >>> blocks = [revflow.AdditiveCoupling(torch.nn.Linear(4, 4)) for _ in range(8)]
        >>> net = revflow.ReversibleSequence(blocks, memory_budget=budget)
        >>> net(torch.randn(2, 8)).sum().backward()  # measures
        >>> budget.plan.calls[0].stored, budget.plan.time_ratio
        (8, 1.0)
    """

    budget: int
    """The memory budget in bytes."""
    calls: tuple[PlannedCall, ...]
    """The calls of the step, in the order in which they run."""
    peak: int
    """Expected peak memory of activations and their gradients, in bytes."""
    time_ratio: float
    """Expected time of the step relative to standard autograd, by count of operations."""

    @property
    def summary(self) -> str:
        """The plan in one line, which is also the last line of the table."""
        counts = [(call.stored, call.outputs_stored, call.units) for call in self.calls]
        stored, outputs, units = map(sum, zip(*counts, strict=True))
        names = " and ".join(dict.fromkeys(f"{c.unit}s" for c in self.calls))
        more = f", and the outputs of {outputs} more," if outputs else ""
        return (
            f"{stored} of {units} {names}{more} stored with a budget of {size(self.budget)}: expected peak {size(self.peak)}, "
            f"expected time {self.time_ratio:.2f}× standard autograd"
        )

    def __str__(self) -> str:
        heading = ("call", "stored", "outputs stored", "recomputed", "memory", "time")
        rows: list[tuple[str, ...]] = [heading]
        for call in self.calls:
            recomputed = call.units - call.stored - call.outputs_stored
            counts = [str(n) for n in (call.stored, call.outputs_stored, recomputed)]
            rows.append((call.name, *counts, size(call.held), f"{call.share:.1%}"))
        return "\n".join([*_aligned(rows), self.summary])

    __repr__ = __str__


def _aligned(rows: list[tuple[str, ...]], left: int = 1) -> list[str]:
    """The rows as lines, of which the first columns are aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([(str.ljust if k < left else str.rjust)(cell, widths[k]) for k, cell in enumerate(row)]).rstrip()
        for row in rows
    ]


@dataclass(frozen=True, repr=False)
class Plan:
    """The plan of a training step for one kind of input: which blocks are stored, and which are recomputed.

    `print(plan)` prints a table.

    Examples:
        >>> net = revflow.ReversibleSequence([revflow.AdditiveCoupling(torch.nn.Linear(4, 4)) for _ in range(8)])
        >>> plan = net.plan(torch.randn(2, 8))
        >>> plan.kept, len(plan.costs)  # no budget: all blocks recompute
        (0, 8)
    """

    budget: int | None
    """The memory budget in bytes, or None if there is no limit."""
    costs: tuple[Cost, ...]
    """The memory cost of each block, in the order in which the blocks run."""
    first_kept: int
    """Index of the first stored block. All later blocks are also stored, and all earlier blocks are recomputed."""
    outputs_kept: frozenset[int]
    """Indices of the recomputed blocks whose conditioners' outputs are stored. Their second evaluation stops early."""
    peak: int
    """Expected peak memory of activations and their gradients, in bytes. It excludes the input and parameter gradients."""
    seconds: tuple[float, ...]
    """Duration of each block's forward pass, in seconds."""

    @property
    def kept(self) -> int:
        """Number of stored blocks."""
        return len(self.costs) - self.first_kept

    @property
    def transient(self) -> int:
        """Largest possible error of `peak`, in bytes: the largest amount of temporary memory used to invert a block."""
        return max((cost.transient for cost in self.costs), default=0)

    @property
    def time_ratio(self) -> float:
        """Expected time of a training step, relative to standard autograd. The backward pass is counted as two forward passes."""
        total, again = 3 * sum(self.seconds), 0.0
        for k in range(self.first_kept):
            cost = self.costs[k]
            again += self.seconds[k] * (1 - cost.spared / cost.work if k in self.outputs_kept else 1)
        return 1 + again / total if total else 1.0

    def __str__(self) -> str:
        total = sum(self.seconds)
        rows: list[tuple[str, ...]] = [("block", "", "", "activations", "to invert", "time")]
        for k, (c, seconds) in enumerate(zip(self.costs, self.seconds, strict=True)):
            output = "output stored" if k in self.outputs_kept else "recomputed"
            state = "stored" if k >= self.first_kept else output
            share = f"{seconds / total:.1%}" if total else ""
            rows.append((c.position, c.kind, state, size(c.graph + c.made), size(c.transient), share))
        lines = _aligned(rows, left=3)
        limit = "without a budget" if self.budget is None else f"with a budget of {size(self.budget)}"
        more = f" and {len(self.outputs_kept)} outputs" if self.outputs_kept else ""
        lines.append(
            f"{self.kept} of {len(self.costs)} blocks{more} stored {limit}: expected peak {size(self.peak)} ± "
            f"{size(self.transient)}, expected time {self.time_ratio:.2f}× standard autograd"
        )
        return "\n".join(lines)

    __repr__ = __str__
