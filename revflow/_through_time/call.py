"""One call of a recurrence, which is a time step: recomputed in the backward pass, or stored by standard autograd."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from weakref import ref

import torch
from torch import Tensor

from revflow._budget.costs import Choice
from revflow._budget.kinds import fingerprint, flags_of
from revflow._budget.step_costs import Inputs, StepMenu
from revflow._budget.step_meter import StepMeter
from revflow._guard.policy import Guard
from revflow._replay.arguments import Arguments
from revflow._replay.autocast import autocast_state
from revflow._rewind.functions import is_held
from revflow._through_time.functions import Results, origin_of, run
from revflow._through_time.states import Storage
from revflow._through_time.steps import StepInput, TimeStep
from revflow._through_time.stored import run_stored
from revflow.cell import RecurrentCell


class StepCall:
    """One time step, prepared to run once."""

    def __init__(self, cells: Sequence[RecurrentCell], given: StepInput, storage: Storage, guard: Guard) -> None:
        self._cells, self._given, self._storage, self._guard = cells, given, storage, guard
        self._origin = origin_of(given.before)
        self._inputs_are_held = all(map(is_held, given.streams))

    @property
    def kind(self) -> tuple[Hashable, ...]:
        """All that determines the memory use of the step."""
        streams, _, _, context = self._given
        arguments = Arguments(context)
        tensors = (*streams, *self._given.before, *arguments.tensors)
        return (
            (*autocast_state(self.device), self._inputs_are_held),
            tuple([(t.shape, t.dtype, t.device, t.requires_grad) for t in tensors]),
            arguments.switches,
            tuple([ref(cell) for cell in self._cells]),
            flags_of(self._cells),
        )

    @property
    def fingerprint(self) -> str:
        """As `kind`, in a text that is the same in another process."""
        options, given, switches, _, flags = self.kind
        return fingerprint((options, given, switches, flags), self._cells)

    @property
    def label(self) -> str:
        """The call's name in a printed plan."""
        return f"time step, {len(self._cells)} cells"

    @property
    def device(self) -> torch.device:
        return self._given.streams[0].device

    def run(self, choice: Choice | None = None, lifetime: Tensor | None = None) -> Results:
        """The output streams, and the new state and memory of every cell. The graph holds `lifetime`.

        The step is recomputed if no choice is given.
        """
        if choice is None or choice.first_stored:
            return run(self._step(), self._given, lifetime)
        return run_stored(self._cells, self._given, self._storage, lifetime)

    def measured(self, lifetime: Tensor | None = None) -> tuple[Results, StepMenu]:
        """The result of `run(None, lifetime)`, which recomputes the step, and the options whose costs it measured."""
        step, streams = self._step(), sum([s.nbytes for s in self._given.streams])
        of_cells = [t for cell in self._cells for t in (*cell.parameters(), *cell.buffers())]
        meter = step.meter = StepMeter([*of_cells, *step.arguments.tensors])
        results = run(step, self._given, lifetime)
        return results, StepMenu(meter.costs, Inputs(streams, self._inputs_are_held), self._storage.handling)

    def _step(self) -> TimeStep:
        return TimeStep(self._cells, self._given, self._origin, self._storage, self._guard)
