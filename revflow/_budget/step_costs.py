"""The memory and the work of one time step of a recurrence, which is recomputed or stored as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from revflow._budget.costs import Choice, Menu, Option


class CellCost(NamedTuple):
    """Memory of one cell in one time step, in bytes, and its work."""

    graph: int
    """Tensors that standard autograd saves for the cell, other than its inputs and outputs."""
    streams: int
    """Streams that the cell makes."""
    results: int
    """Its new state and memory."""
    gradient: int
    """The gradient of the graph's largest tensor."""
    update: int
    """The work of `update`."""
    mix: int
    """The work of `mix`."""


class Inputs(NamedTuple):
    """The input streams of a time step."""

    nbytes: int
    are_held: bool
    """Whether an earlier call holds them, so that the step holds no further bytes."""


class Handling(NamedTuple):
    """How a way of storing states changes the memory and the work of a time step."""

    stored: float
    """Share of the results that a recomputed step holds."""
    unpacked: float
    """Further multiples of the results that exist while a step is recomputed."""
    repeated: float
    """Further evaluations of a step, besides the second one."""


class StepMenu(Menu):
    """The options of one time step."""

    unit = "cell"

    def __init__(self, costs: Sequence[CellCost], inputs: Inputs, handling: Handling) -> None:
        self._costs, self._inputs, self._handling = tuple(costs), inputs, handling
        streams, anchor = inputs.nbytes, 0 if inputs.are_held else inputs.nbytes
        results = sum([cost.results for cost in costs])
        made, graph = sum([cost.streams for cost in costs]), sum([cost.graph for cost in costs])
        gradient = max([cost.gradient for cost in costs], default=0)
        # A second evaluation takes a cell's graph and its outputs, and then the gradients of its inputs and those inside of it,
        # of which two exist at a time: that of an operator's output, and those of its inputs.
        transient = max([c.graph + c.streams + 2 * c.results + 2 * c.gradient for c in costs], default=0) + streams
        held = anchor + int(results * handling.stored)
        unpacked = int(results * handling.unpacked)
        update, mix = sum([cost.update for cost in costs]), sum([cost.mix for cost in costs])
        again = update + 2 * mix + int(handling.repeated * (update + mix))
        least = Option(Choice(1), held + made + 2 * streams + transient + unpacked, held, 0)
        stored = anchor + results + made + graph
        most = Option(Choice(0), stored + 2 * streams + 2 * gradient, stored, again)
        self.carried = results
        super().__init__(least, [least, most], update + mix)
        self.again = again

    @property
    def measured(self) -> list[Any]:
        return [[*map(list, self._costs)], list(self._inputs), list(self._handling)]

    def parts(self, choice: Choice) -> tuple[int, int, int]:
        return 0 if choice.first_stored else len(self._costs), 0, len(self._costs)
