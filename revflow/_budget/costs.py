"""The memory and the work of one call, for each choice of what to store: arithmetic alone.

A block has three choices. It is recomputed; or it is recomputed from its output and the stored outputs of its conditioners, so
that the second evaluation stops early; or standard autograd stores its activations. The stored blocks of a call are its last
ones: the backward pass starts with them, and frees their activations before the first inversion needs memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar, NamedTuple


class Cost(NamedTuple):
    """Memory of one block, in bytes, and its work."""

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
    work: int = 0
    """Operations of the block's forward pass, with the bytes that they move."""
    output: int = 0
    """The outputs of its conditioners; 0 if storing them saves no work."""
    spared: int = 0
    """The part of `work` that the second evaluation skips if these outputs are stored."""


class Choice(NamedTuple):
    """What a call stores."""

    first_stored: int
    """The first block whose activations are stored. All later ones are stored as well, and all earlier ones are recomputed."""
    outputs: frozenset[int] = frozenset()
    """The recomputed blocks whose conditioners' outputs are stored."""


class Option(NamedTuple):
    """A choice, and its consequences."""

    choice: Choice
    peak: int
    """Bytes of activations and their gradients while the call runs, forward or backward."""
    held: int
    """Bytes that are held when the call has returned, its output included."""
    spared: int
    """Work of the second evaluation that is saved, compared with recomputing everything."""


class Menu(ABC):
    """The options of one call."""

    unit: ClassVar[str]
    """The name of a part of the call that is stored or recomputed."""
    carried = 0
    """Bytes of gradients that wait in the backward pass while other calls run: those of a recurrence's states."""

    def __init__(self, least: Option, options: Sequence[Option], work: int) -> None:
        """`least` is the option that recomputes everything."""
        self.work = work
        """The work of one forward pass."""
        self.least = least
        self.by_peak = _rising(sorted(options, key=lambda o: (o.peak, -o.spared)))
        """Options of rising peak, each of which saves more work than the one before."""
        self.by_held = _hull(_rising(sorted(options, key=lambda o: (o.held, -o.spared))))
        """Options of rising held bytes, each of which saves less work per additional byte than the one before."""

    @property
    def most(self) -> Option:
        """The option that saves the most work."""
        return self.by_peak[-1]

    @abstractmethod
    def parts(self, choice: Choice) -> tuple[int, int, int]:
        """The number of units that are stored, of those whose outputs are stored, and of all."""


def _rising(options: Sequence[Option]) -> list[Option]:
    """Those that save more work than all before them."""
    found: list[Option] = []
    for option in options:
        if not found or option.spared > found[-1].spared:
            found.append(option)
    return found


def _hull(options: Sequence[Option]) -> list[Option]:
    """Those on the upper hull of work over held bytes."""
    hull: list[Option] = []
    for option in options:
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) < _gain(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _gain(a: Option, b: Option) -> float:
    return (b.spared - a.spared) / (b.held - a.held)


_MOST_SETS = 100
"""Sets of stored outputs that are compared for one call."""


class SequenceMenu(Menu):
    """The options of one call of a sequence."""

    unit = "block"

    def __init__(self, costs: Sequence[Cost], joined: bool, rounded: bool) -> None:
        """`joined`: whether the output's streams are copied into one tensor; `rounded`: whether the input is copied to a grid."""
        self.costs, self._rounded = tuple(costs), rounded
        self._output = costs[-1].outputs * (1 + joined) if costs else 0
        self._suffixes = self._stored_blocks()
        offered = [k for k, cost in enumerate(costs) if cost.spared > 0 and cost.output > 0]
        offered.sort(key=lambda k: (-costs[k].spared / costs[k].output, -k))  # of equal ones, the last is freed first
        options = [
            option
            for count in range(0, len(offered) + 1, 1 + len(offered) // _MOST_SETS)
            for option in self._options(frozenset(offered[:count]))
        ]
        super().__init__(self.option(Choice(len(costs))), options, sum([cost.work for cost in costs]))

    def option(self, choice: Choice) -> Option:
        """The consequences of a choice."""
        return next(o for o in self._options(choice.outputs) if o.choice == choice)

    def parts(self, choice: Choice) -> tuple[int, int, int]:
        return len(self.costs) - choice.first_stored, len(choice.outputs), len(self.costs)

    def _stored_blocks(self) -> list[tuple[int, int]]:
        """By number of the first stored block: the peak and the held bytes of the blocks from that one on.

        Activations of a block are alive until the block itself has been differentiated.
        """
        costs, output = self.costs, self._output
        last = len(costs) - 1
        own_output = costs[last].outputs if costs else 0
        found = [(output, own_output)]
        stored = backward = 0  # `stored` are the activations of blocks k and later, without the output.
        for k in range(last, -1, -1):
            cost = costs[k]
            own = cost.graph + cost.made * (k < last)
            stored += own
            backward = own + max(cost.outputs + cost.gradient, backward)
            boundary = cost.inputs if k or self._rounded else 0  # The input of the whole call is the caller's.
            found.append((boundary + max(backward, stored + output), boundary + stored + own_output))
        return found[::-1]

    def _options(self, outputs: frozenset[int]) -> Iterator[Option]:
        """Every first stored block, together with these stored outputs of blocks before it.

        Inverting a block takes its streams, their gradients and its temporary memory, while the tensors that the blocks up to
        this one have stored are alive.
        """
        costs, end = self.costs, max(outputs, default=-1)
        rest = sum([cost.work for cost in costs])
        inverting = held = spared = 0
        for k, (peak, stored) in enumerate(self._suffixes):
            if k > end:
                yield Option(Choice(k, outputs), max(peak + held, inverting), held + stored, spared + rest)
            if k < len(costs):
                cost = costs[k]
                held += cost.anchors
                rest -= cost.work
                if k in outputs:
                    held += cost.output
                    spared += cost.spared
                inverting = max(inverting, held + 2 * cost.outputs + cost.transient)
