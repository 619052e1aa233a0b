"""The memory that standard autograd would take for each cell of a time step, measured in a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain

from torch import Tensor, nn

from revflow._base.streams import CellValues
from revflow._base.torch_private import is_compiled
from revflow._budget.recording import Recording, storages, without_graph
from revflow._budget.step_costs import CellCost


class StepMeter:
    """Measures one time step."""

    def __init__(self, given: Iterable[Tensor]) -> None:
        """`given`: tensors that exist before the step and do not count: parameters, buffers, context."""
        self.costs: list[CellCost] = []
        """By cell, in the order in which the cells ran."""
        self._given = storages(given).keys()
        self._update = 0
        self._recording: Recording | None = None

    def first(self, evaluate: Callable[[], CellValues], given: CellValues, cell: nn.Module) -> CellValues:
        """The result of `evaluate`, an evaluation of the cell, which is measured."""
        taken = tuple(chain(*given))
        before = storages(taken)
        recording = self._recording = Recording(self._given | before.keys(), is_compiled(cell))
        with recording.running():
            made = evaluate()
        saved = recording.section()
        results = _without(storages([*made.state, *made.memory]), before)
        streams = _without(storages(made.streams), before | results)
        self.costs.append(
            CellCost(
                graph=sum(_without(saved, results | streams).values()),
                streams=sum(streams.values()),
                results=sum(results.values()),
                gradient=max(saved.values(), default=0),
                update=self._update,
                mix=recording.work - self._update,
            )
        )
        return CellValues(*[without_graph(tensors, taken) for tensors in made])

    def updated(self) -> None:
        """The cell's `update` has run; its `mix` follows."""
        assert self._recording is not None
        self._update = self._recording.work


def _without(sizes: dict[int, int], others: dict[int, int]) -> dict[int, int]:
    return {key: size for key, size in sizes.items() if key not in others}
