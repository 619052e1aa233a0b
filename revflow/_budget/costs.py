"""The memory and the work of one call, for each choice of the tensors to store. Nothing here runs a block.

A block has three choices. In the first one, it is recomputed. In the second one, the outputs of its conditioners are stored, so
that their second evaluation stops early. In the third one, standard autograd stores its activations. The blocks of the third kind
are the last ones of a call: the backward pass starts with them, and frees their activations before the first inversion needs
memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, ClassVar, NamedTuple


class Cost(NamedTuple):
    """Memory of one block, in bytes, and its work."""

    position: str
    """The block's name in the sequence."""
    kind: str
    """The name of the block's class."""
    graph: int
    """Tensors that standard autograd saves for the block, other than streams."""
    made: int
    """Streams that the block makes, and that the graph of a later block saves."""
    inputs: int
    """All streams before the block."""
    outputs: int
    """All streams after the block."""
    unsaved: int
    """Of these, the streams that no graph has saved so far."""
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
    """The blocks of a call that are stored."""

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

    again: int
    """The work of recomputing everything."""

    def __init__(self, least: Option, options: Sequence[Option], work: int) -> None:
        """`least` is the option that recomputes everything."""
        self.work = self.again = work
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

    @property
    @abstractmethod
    def measured(self) -> list[Any]:
        """The measured costs as plain values, of which `saved_costs.restored` makes the same menu."""

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


HOOKS = 60_000_000
"""The work that takes as long as the hooks of an evaluation whose output is stored: about half a millisecond on a CPU. An output
that spares less is not stored."""

_MOST_STARTS, _MOST_SETS = 100, 50
"""First stored blocks that are compared for one call, and for each of them, sets of stored outputs."""


class SequenceMenu(Menu):
    """The options of one call of a sequence."""

    unit = "block"

    def __init__(self, costs: Sequence[Cost], joined: bool, rounded: bool) -> None:
        """`joined`: whether the output's streams are copied into one tensor; `rounded`: whether the input is copied to a grid."""
        self.costs, self._joined, self._rounded = tuple(costs), joined, rounded
        self._output = costs[-1].outputs * (1 + joined) if costs else 0
        self._suffixes = self._stored_blocks()
        self._work = [*accumulate([cost.work for cost in reversed(costs)], initial=0)][::-1]
        """By number of the first stored block: the work of the stored blocks."""
        super().__init__(self.option(Choice(len(costs))), [*map(self.option, self._choices())], self._work[0])

    @property
    def measured(self) -> list[Any]:
        return [[*map(list, self.costs)], self._joined, self._rounded]

    def parts(self, choice: Choice) -> tuple[int, int, int]:
        return len(self.costs) - choice.first_stored, len(choice.outputs), len(self.costs)

    def option(self, choice: Choice) -> Option:
        """The consequences of a choice.

        Inverting a block takes its streams, their gradients and its temporary memory, while the tensors that the blocks up to
        this one have stored are alive.
        """
        first_stored, outputs = choice
        peak, stored = self._suffixes[first_stored]
        inverting = held = 0
        spared = self._work[first_stored]
        for k, cost in enumerate(self.costs[:first_stored]):
            held += cost.anchors
            temporary = 2 * cost.outputs + cost.transient
            if k in outputs:
                held += cost.output
                spared += cost.spared - HOOKS
            inverting = max(inverting, held + temporary)
        return Option(choice, max(peak + held, inverting), held + stored, spared)

    def _choices(self) -> Iterator[Choice]:
        """Each first stored block, with the outputs of earlier blocks that save the most work per byte."""
        costs, count = self.costs, len(self.costs)
        offered = [k for k, cost in enumerate(costs) if cost.spared > HOOKS and cost.output > 0]
        offered.sort(
            key=lambda k: ((HOOKS - costs[k].spared) / costs[k].output, -k)
        )  # of equal ones, the last is freed first
        for first_stored in range(count, -1, -1 - count // _MOST_STARTS):
            before = [k for k in offered if k < first_stored]
            for number in range(0, len(before) + 1, 1 + len(before) // _MOST_SETS):
                yield Choice(first_stored, frozenset(before[:number]))
        yield Choice(0)

    def _stored_blocks(self) -> list[tuple[int, int]]:
        """By number of the first stored block: the peak and the held bytes of the blocks from that one on.

        Activations of a block are alive until the block itself has been differentiated.
        """
        costs, output = self.costs, self._output
        last = len(costs) - 1
        outputs, unsaved = (costs[last].outputs, costs[last].unsaved) if costs else (0, 0)
        own_output = outputs if self._joined else unsaved  # Joined streams are copies.
        found = [(output, outputs)]
        stored = backward = 0  # `stored` are the activations of blocks k and later, without the output.
        for k in range(last, -1, -1):
            cost = costs[k]
            own = cost.graph + cost.made * (k < last)
            stored += own
            backward = own + max(cost.outputs + cost.gradient, backward)
            boundary = cost.inputs if k or self._rounded else 0  # The input of the whole call is the caller's.
            found.append((boundary + max(backward, stored + output), boundary + stored + own_output))
        return found[::-1]
