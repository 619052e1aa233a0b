"""The memory budget: which blocks of a sequence are stored, and which recompute.

The stored blocks are the last ones: the backward pass starts with them, and frees their activations before the first inversion
needs memory. A schedule is therefore one number, the first stored block. From that block on, standard autograd takes over.

The costs of the blocks are measured once for each kind of input, in the first training step, which recomputes all blocks. The
forward pass of each block then runs with a graph, whose saved tensors are counted and dropped. `Table` computes the peak of
every schedule from these bytes; no further step is run.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from revflow._base.free_memory import free_memory
from revflow._base.memory_size import MemoryBudget, parse, size
from revflow._base.torch_private import hooks_saved_tensors
from revflow._base.user_warnings import warn

_log = logging.getLogger(__name__)


_KINDS_OF_INPUT = 64
"""Kinds of input whose costs are remembered. A further kind replaces the oldest one, which is measured again if it returns."""


class Cost(NamedTuple):
    """Memory of one block, in bytes."""

    position: str
    """The block's name in the sequence."""
    kind: str
    """The name of the block's class."""
    graph: int
    """Tensors that standard autograd saves for the block, other than streams."""
    made: int
    """Streams that the block makes."""
    inputs: int
    """All streams before the block."""
    outputs: int
    """All streams after the block."""
    anchors: int
    """Tensors that a recomputed block stores for its inversion."""
    transient: int
    """Temporary memory of the block's inversion, other than the streams and their gradients: its graph, and the gradient of the
    graph's largest tensor."""
    gradient: int
    """The gradient of the graph's largest tensor, which a stored block needs as well."""


class Table:
    """The peak of every schedule, for one kind of input. Schedule k stores the blocks from number k on."""

    def __init__(self, costs: Sequence[Cost], joined: bool, rounded: bool) -> None:
        """`joined`: whether the output's streams are copied into one tensor; `rounded`: whether the input is copied to a grid."""
        self.costs = tuple(costs)
        last = len(costs) - 1
        output = costs[last].outputs * (1 + joined) if costs else 0
        self.peaks = [0] * len(costs) + [output]
        """By schedule: bytes of activations and their gradients."""
        self.held = [costs[last].outputs if costs else 0] * (len(costs) + 1)
        """By schedule: bytes that are held when the call has returned, its output included."""
        # Stored blocks, from the last one. `stored` are the activations of blocks k and later, without the output. `backward` is
        # the peak of their backward pass: block k's activations are alive until block k itself has been differentiated.
        stored = backward = 0
        for k in range(last, -1, -1):
            cost = costs[k]
            own = cost.graph + cost.made * (k < last)
            stored += own
            backward = own + max(cost.outputs + cost.gradient, backward)
            boundary = cost.inputs if k or rounded else 0  # The input of the whole call is the caller's.
            self.held[k] += boundary + stored
            self.peaks[k] = boundary + max(backward, stored + output)
        # Recomputed blocks, from the first one. Inverting a block takes its streams, their gradients and its temporary memory,
        # while the anchors of the blocks up to this one are alive.
        inverting = anchors = 0
        for k, cost in enumerate(costs, 1):
            anchors += cost.anchors
            inverting = max(inverting, anchors + 2 * cost.outputs + cost.transient)
            self.held[k] += anchors
            self.peaks[k] = max(self.peaks[k] + anchors, inverting)

    def first_kept(self, available: int) -> int | None:
        """The schedule that stores the most blocks within `available` bytes; None if none fits."""
        return next((k for k, peak in enumerate(self.peaks) if peak <= available), None)

    def best(self, available: int) -> int:
        """As `first_kept`; if none fits, the schedule of the lowest peak."""
        found = self.first_kept(available)
        return self.lowest if found is None else found

    @property
    def lowest(self) -> int:
        """The schedule of the lowest peak; if there are several, the one that stores the most blocks."""
        return self.peaks.index(min(self.peaks))


@dataclass(frozen=True, repr=False)
class Plan:
    """The schedule of a training step for one kind of input: which blocks are stored, and which are recomputed.

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
        total = 3 * sum(self.seconds)
        return 1 + sum(self.seconds[: self.first_kept]) / total if total else 1.0

    def __str__(self) -> str:
        width = max([len(c.position) for c in self.costs] + [5])
        kinds = max([len(c.kind) for c in self.costs] + [4])
        lines = [f"{'block':<{width}}  {'':<{kinds}}  {'':<10}  {'activations':>11}  {'to invert':>11}  {'time':>5}"]
        total = sum(self.seconds)
        for k, (c, seconds) in enumerate(zip(self.costs, self.seconds, strict=True)):
            state = "stored" if k >= self.first_kept else "recomputed"
            share = f"{seconds / total:.1%}" if total else ""
            lines.append(
                f"{c.position:<{width}}  {c.kind:<{kinds}}  {state:<10}  {size(c.graph + c.made):>11}  "
                f"{size(c.transient):>11}  {share:>5}"
            )
        limit = "without a budget" if self.budget is None else f"with a budget of {size(self.budget)}"
        lines.append(
            f"{self.kept} of {len(self.costs)} blocks stored {limit}: expected peak {size(self.peak)} ± "
            f"{size(self.transient)}, expected time {self.time_ratio:.2f}× standard autograd"
        )
        return "\n".join(lines)

    __repr__ = __str__


Result = tuple[Any, Any]
"""The output of a call, a tensor or a tuple of streams, and the log-determinant or None."""


class BudgetedCall(Protocol):
    """The interface through which a budget runs one call of a sequence; `_rewind.chain.ChainCall` implements it."""

    @property
    def kind(self) -> Hashable:
        """The kind of input: calls of equal kinds have equal costs."""

    @property
    def device(self) -> torch.device: ...

    def run(self, first_kept: int | None = None, lifetime: Tensor | None = None) -> Result:
        """Run the call; None recomputes all blocks. The graph holds `lifetime` until it is freed."""

    def measured(self, lifetime: Tensor | None = None) -> tuple[Result, Table]:
        """The result of `run(None, lifetime)`, and the costs that were measured on the way."""


class Budget:
    """The memory budget of a sequence, with the costs measured so far and the bytes in use."""

    def __init__(self, given: MemoryBudget) -> None:
        self.given = given
        self._limit = parse(given)
        self._known: dict[Hashable, tuple[int, Table]] = {}
        """By kind of input: the limit in bytes, and the costs."""
        self._in_use = 0
        """Bytes that the graphs of all pending calls hold."""
        self._pending = 0
        """Number of calls whose graph has not been freed."""
        self._most_pending = 1
        """Largest number of pending calls so far. A recurrent network makes T calls before its backward pass, and its first
        training step counts them. From then on, each call leaves memory for those to come."""
        self._warned = False

    def __getstate__(self) -> dict[str, object]:
        # A copy of the sequence has no graphs, and its blocks have not been measured.
        return {**self.__dict__, "_known": {}, "_in_use": 0, "_pending": 0}

    @property
    def is_limited(self) -> bool:
        """Whether the number of stored blocks depends on their costs: the budget is neither "min" nor "max"."""
        return not isinstance(self._limit, str)

    @property
    def keeps_all(self) -> bool:
        """Whether standard autograd runs all blocks: the budget is "max"."""
        return self._limit == "max"

    def run(self, call: BudgetedCall) -> Result:
        """The result of the call, with as many blocks stored as fit in the memory that pending calls leave."""
        if hooks_saved_tensors():
            # The hooks decide where tensors are stored, so their memory is unknown. torch.utils.checkpoint also requires that
            # both of its runs save the same tensors.
            return call.run()
        kind, lifetime = call.kind, torch.empty(0)
        if kind in self._known:
            limit, table = self._known[kind]
            first_kept = self._first_kept(table, limit)
            result = call.run(first_kept, lifetime)
        else:
            limit = self._limit_on(call.device)
            result, table = call.measured(lifetime)
            self._learn(kind, table, limit)
            first_kept = len(table.costs)
        self._count(table.held[first_kept], lifetime)
        return result

    def schedule(self, call: BudgetedCall) -> tuple[int | None, Table, int]:
        """The limit in bytes, the costs, and the first stored block of such a call if no other call is pending."""
        kind = call.kind
        if isinstance(self._limit, str):
            _, table = call.measured()
            return None, table, 0 if self.keeps_all else len(table.costs)
        limit = self._known[kind][0] if kind in self._known else self._limit_on(call.device)
        _, table = call.measured()
        self._learn(kind, table, limit)
        return limit, table, table.best(limit)

    def _learn(self, kind: Hashable, table: Table, limit: int) -> None:
        """Remember the costs of a kind of input."""
        if len(self._known) == _KINDS_OF_INPUT:
            del self._known[next(iter(self._known))]
        self._known[kind] = limit, table
        blocks, first_kept = len(table.costs), table.best(limit)
        stored, peak = blocks - first_kept, size(table.peaks[first_kept])
        _log.info(
            "memory_budget=%r: %d of %d blocks stored per call, expected peak %s", self.given, stored, blocks, peak
        )

    def _limit_on(self, device: torch.device) -> int:
        """The limit in bytes; a share is taken of the memory that is free now."""
        assert not isinstance(self._limit, str)
        return self._limit if isinstance(self._limit, int) else int(self._limit * free_memory(device))

    def _first_kept(self, table: Table, limit: int) -> int:
        """The first stored block of a call, given the pending calls and those to come."""
        recompute_all = len(table.costs)
        to_come = self._most_pending - self._pending - 1
        if to_come < 0:  # More calls are pending than ever before, so the number of those to come is unknown.
            return recompute_all
        reserved = to_come * table.held[-1]
        found = table.first_kept(limit - self._in_use - reserved)
        if found is not None:
            return found
        if self._pending:
            return recompute_all
        lowest = recompute_all if to_come else table.lowest
        if not self._warned:
            self._warned = True
            warn(
                f"memory_budget={self.given!r} is too small: a training step on such inputs needs at least "
                f"{size(table.peaks[lowest] + reserved)}, and exceeds the budget. Reduce the batch size, or set chunks=n. (Shown "
                f"once per sequence.)",
                UserWarning,
            )
        return lowest

    def _count(self, size: int, lifetime: Tensor) -> None:
        """Count `size` bytes as in use until `lifetime` is freed, which the call's graph holds."""
        self._in_use += size
        self._pending += 1
        self._most_pending = max(self._most_pending, self._pending)
        weakref.finalize(lifetime, self._release, size).atexit = False

    def _release(self, size: int) -> None:
        self._in_use -= size
        self._pending -= 1
