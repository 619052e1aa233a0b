"""Which blocks of a chain to keep, instead of rebuilding them, in the memory that it may take.

Kept blocks stand at the end: their activations are gone before the first rewind needs room. So a schedule is one number, the
block from which on ordinary autograd takes over.

What a block keeps is measured once for each kind of input, in the first training step, which rebuilds everything: its forward
pass runs with a graph, whose saved tensors are counted and dropped again. From these bytes the peak of every schedule follows
(`Table`); no step is run for it.
"""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from revflow._base.bytes import MemoryBudget, free_memory, parse, size
from revflow._base.torch_private import hooks_saved_tensors

_log = logging.getLogger(__name__)


_KINDS_OF_INPUT = 64
"""How many are remembered: with inputs of ever other shapes, the oldest are measured again."""


class Cost(NamedTuple):
    """What one block takes, in bytes."""

    position: str
    kind: str
    graph: int
    """What ordinary autograd keeps of it, beside the streams."""
    made: int
    """The streams that it makes."""
    inputs: int
    """All streams in front of it."""
    outputs: int
    """All streams behind it."""
    anchors: int
    """What is kept for its rewind where it is rebuilt."""
    transient: int
    """What undoing it takes for the time being, beside the streams and their gradients: its graph, and the gradient of the
    largest tensor in that."""
    gradient: int
    """That gradient alone, which a kept block takes too."""


class Table:
    """The peak of every schedule of one chain, for one kind of input."""

    def __init__(self, costs: Sequence[Cost], joined: bool, rounded: bool) -> None:
        """`joined`: whether the output's streams are copied into one tensor; `rounded`: whether the input's are, to a grid."""
        self.costs = tuple(costs)
        last = len(costs) - 1
        output = costs[last].outputs * (1 + joined) if costs else 0
        self.peaks = [0] * len(costs) + [output]
        """Of activations and their gradients, by the first block that is kept."""
        self.kept = [costs[last].outputs if costs else 0] * (len(costs) + 1)
        """What is kept when the call has returned, its output included, by the first block that is kept."""
        held = backward = 0
        for k in range(last, -1, -1):
            cost = costs[k]
            held += cost.graph + cost.made * (k < last)  # of the output itself
            backward = cost.graph + cost.made * (k < last) + max(cost.outputs + cost.gradient, backward)
            anchor = cost.inputs if k or rounded else 0  # else it is the caller's
            self.kept[k] += anchor + held
            self.peaks[k] = anchor + max(backward, held + output)
        rewound = anchors = 0
        for k, cost in enumerate(costs, 1):
            anchors += cost.anchors
            rewound = max(rewound, anchors + 2 * cost.outputs + cost.transient)
            self.kept[k] += anchors
            self.peaks[k] = max(self.peaks[k] + anchors, rewound)

    def first_kept(self, available: int) -> int | None:
        """The schedule that keeps most in the bytes available; None where none fits."""
        return next((k for k, peak in enumerate(self.peaks) if peak <= available), None)

    def best(self, available: int) -> int:
        """As `first_kept`; where none fits, the most frugal."""
        found = self.first_kept(available)
        return self.most_frugal if found is None else found

    @property
    def most_frugal(self) -> int:
        """The schedule of the lowest peak; of several, the one that keeps most."""
        return self.peaks.index(min(self.peaks))


@dataclass(frozen=True, repr=False)
class Plan:
    """What a sequence keeps and what it rebuilds, for inputs of one kind. Printed, it is a table.

    Examples:
        >>> net = revflow.ReversibleSequence([revflow.AdditiveCoupling(torch.nn.Linear(4, 4)) for _ in range(8)])
        >>> plan = net.plan(torch.randn(2, 8))  # print it for the table
        >>> plan.kept, len(plan.costs)  # no budget: all blocks recompute
        (0, 8)
    """

    budget: int | None
    """Bytes; None where it is not limited."""
    costs: tuple[Cost, ...]
    """By block, in the order in which they run."""
    first_kept: int
    """Blocks from here on are kept."""
    peak: int
    """Expected bytes of the chain's activations and their gradients; not of its input, nor of parameters' gradients."""
    seconds: tuple[float, ...]
    """Of each block's forward pass."""

    @property
    def kept(self) -> int:
        """How many blocks are kept."""
        return len(self.costs) - self.first_kept

    @property
    def transient(self) -> int:
        """The most that undoing one block takes for the time being, in bytes: the peak is not missed by more."""
        return max((cost.transient for cost in self.costs), default=0)

    @property
    def time_ratio(self) -> float:
        """Expected time of a training step, against ordinary autograd's: a backward pass takes two forward passes' time."""
        total = 3 * sum(self.seconds)
        return 1 + sum(self.seconds[: self.first_kept]) / total if total else 1.0

    def __str__(self) -> str:
        width = max([len(c.position) for c in self.costs] + [5])
        kinds = max([len(c.kind) for c in self.costs] + [4])
        lines = [f"{'block':<{width}}  {'':<{kinds}}  {'':<7}  {'activations':>11}  {'to undo':>11}  {'time':>5}"]
        total = sum(self.seconds)
        for k, (c, seconds) in enumerate(zip(self.costs, self.seconds, strict=True)):
            state = "kept" if k >= self.first_kept else "rebuilt"
            share = f"{seconds / total:.1%}" if total else ""
            lines.append(
                f"{c.position:<{width}}  {c.kind:<{kinds}}  {state:<7}  {size(c.graph + c.made):>11}  "
                f"{size(c.transient):>11}  {share:>5}"
            )
        limit = "no budget" if self.budget is None else f"a budget of {size(self.budget)}"
        lines.append(
            f"{self.kept} of {len(self.costs)} blocks kept: expected peak {size(self.peak)}, with {limit}; not missed by more "
            f"than {size(self.transient)}. Expected time {self.time_ratio:.2f} of ordinary autograd's"
        )
        return "\n".join(lines)

    __repr__ = __str__


Result = tuple[Any, Any]
"""A chain's output, a tensor or a tuple of streams, and the log-determinant or None."""


class ChainCall(Protocol):
    """A call of a chain of blocks, as far as the budget knows it."""

    @property
    def kind(self) -> Hashable: ...

    @property
    def device(self) -> torch.device: ...

    def run(self, first_kept: int | None = None, lifetime: Tensor | None = None) -> Result: ...

    def measured(self, lifetime: Tensor | None = None) -> tuple[Result, Table]: ...


class Budget:
    """A sequence's memory budget, what is known of its costs, and how much of it is in use."""

    def __init__(self, given: MemoryBudget) -> None:
        self.given = given
        self._limit = parse(given)
        self._known: dict[Hashable, tuple[int, Table]] = {}
        """By kind of input: the limit in bytes, and the costs."""
        self._in_use = 0
        self._pending = 0
        """Calls that hold something."""
        self._most_pending = 1
        """As far as is known: where a recurrence calls the sequence T times before it goes back, its first step shows that."""
        self._warned = False

    def __getstate__(self) -> dict[str, object]:
        # A copy has no activations yet, and blocks of its own.
        return {**self.__dict__, "_known": {}, "_in_use": 0, "_pending": 0}

    @property
    def is_limited(self) -> bool:
        """Whether it depends on the blocks' costs what is kept."""
        return not isinstance(self._limit, str)

    @property
    def keeps_all(self) -> bool:
        return self._limit == "all"

    def run(self, chain: ChainCall) -> Result:
        """What the chain returns, with as many blocks kept as fit beside what earlier calls still hold."""
        if hooks_saved_tensors():
            # Nobody knows where it is kept then, and torch.utils.checkpoint wants the same in both of its runs.
            return chain.run()
        kind, lifetime = chain.kind, torch.empty(0)
        if kind in self._known:
            limit, table = self._known[kind]
            first_kept = self._first_kept(table, limit)
            result = chain.run(first_kept, lifetime)
        else:
            limit = self._bytes(chain.device)
            result, table = chain.measured(lifetime)
            self._learn(kind, table, limit)
            first_kept = len(table.costs)
        self._count(table.kept[first_kept], lifetime)
        return result

    def schedule(self, chain: ChainCall) -> tuple[int | None, Table, int]:
        """The limit in bytes, the costs, and the first block that a call like this keeps when nothing else is held."""
        kind = chain.kind
        if isinstance(self._limit, str):
            _, table = chain.measured()
            return None, table, 0 if self.keeps_all else len(table.costs)
        limit = self._known[kind][0] if kind in self._known else self._bytes(chain.device)
        _, table = chain.measured()
        self._learn(kind, table, limit)
        return limit, table, table.best(limit)

    def _learn(self, kind: Hashable, table: Table, limit: int) -> None:
        if len(self._known) == _KINDS_OF_INPUT:
            del self._known[next(iter(self._known))]
        self._known[kind] = limit, table
        blocks, first_kept = len(table.costs), table.best(limit)
        kept, peak = blocks - first_kept, size(table.peaks[first_kept])
        _log.info("memory_budget=%r keeps %d of %d blocks of a call: expected peak %s", self.given, kept, blocks, peak)

    def _bytes(self, device: torch.device) -> int:
        assert not isinstance(self._limit, str)
        return self._limit if isinstance(self._limit, int) else int(self._limit * free_memory(device))

    def _first_kept(self, table: Table, limit: int) -> int:
        to_come = self._most_pending - self._pending - 1
        if to_come < 0:  # more than there ever were: who knows how many follow
            return len(table.costs)
        found = table.first_kept(limit - self._in_use - to_come * table.kept[-1])
        if found is not None:
            return found
        if self._pending:
            return len(table.costs)
        least = len(table.costs) if to_come else table.most_frugal
        if not self._warned:
            self._warned = True
            needed = size(table.peaks[least] + to_come * table.kept[-1])
            warnings.warn(
                f"memory_budget={self.given!r} is less than the {needed} that this sequence needs to train on such inputs, "
                f"whatever it keeps: it will take that. A smaller batch needs less, and so does chunks=n. (This is said once "
                f"for a sequence.)",
                stacklevel=2,
            )
        return least

    def _count(self, size: int, lifetime: Tensor) -> None:
        """Count `size` bytes as in use until `lifetime` is freed, which the call's graph has saved."""
        self._in_use += size
        self._pending += 1
        self._most_pending = max(self._most_pending, self._pending)
        weakref.finalize(lifetime, self._release, size).atexit = False

    def _release(self, size: int) -> None:
        self._in_use -= size
        self._pending -= 1
