"""One time step of a recurrence: its parts in the forward pass, and their second evaluation in the backward pass.

A time step passes its streams through K cells. Each cell has two parts. The expensive one, `update`, computes the cell's new
state. The cheap one, `mix`, computes the cell's output streams from its input streams and that state. The new states and
memories of all cells are the results of the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from revflow._base.streams import CellValues, Context, Streams, Tensors
from revflow._base.torch_private import is_going_to_run
from revflow._budget.step_meter import StepMeter
from revflow._guard.policy import Guard
from revflow._guard.recurrences import Watch
from revflow._replay.arguments import Arguments
from revflow._replay.random_states import Draws
from revflow._replay.replay import Replay
from revflow._rewind.graph import aliases_of
from revflow._through_time.passes import BackwardPass
from revflow._through_time.states import Like, Storage
from revflow.cell import RecurrentCell


class CellCall:
    """The evaluation of a cell in one time step."""

    def __init__(self, cell: RecurrentCell, state: Tensors, device: torch.device) -> None:
        self.module = cell
        self.state_size = len(state)
        self.update, self.mix = Replay(cell, device), Replay(cell, device)
        self.parameters = self.update.parameters
        self._versions = [p._version for p in self.parameters]

    def first(self, step: TimeStep, given: CellValues, context: Context) -> CellValues:
        taken = [*chain(*given)]
        versions = [t._version for t in taken]
        reachable = step.arguments.watch(context)
        # Aliases, since hooks that the cell registers on its arguments must not outlive this evaluation.
        aliases = CellValues(*[tuple(aliases_of(tensors)) for tensors in given])
        state, memory = self.update.first(step.draws, self.module.update, *aliases, context)
        _refuse_hooks(aliases)
        _check("update", "state", state, given.state)
        _check("update", "memory", memory, given.memory)
        state, memory = _own(state, aliases, given), _own(memory, aliases, given)
        state, memory = step.rounded(state), step.rounded(memory)
        taken += state  # an input of mix
        versions += [t._version for t in state]
        if step.meter is not None:
            step.meter.updated()
        given, aliases = CellValues(given.streams, state, ()), CellValues(aliases.streams, tuple(aliases_of(state)), ())
        streams = self.mix.first(step.draws, self.module.mix, aliases.streams, aliases.state, context)
        _check("mix", "streams", streams, given.streams)
        streams = _own(streams, aliases, given)
        if reachable is not None:
            reachable.refuse_changes(self.module)
        if [t._version for t in taken] != versions:
            raise RuntimeError(
                "its streams, its state or its memory were changed in place, which cannot be inverted; let it work on a copy"
            )
        return CellValues(streams, state, memory)

    def again(self, own: list[Tensor], step: TimeStep, given: CellValues, context: Context) -> CellValues:
        """The same evaluation with a graph; `own` are the parameters."""
        state, memory = self.update.again(own, self.module.update, *given, context)
        with torch.enable_grad():
            state, memory = step.rounded(state), step.rounded(memory)
        return CellValues(self.mix.again(own, self.module.mix, given.streams, state, context), state, memory)

    def results(self, given: CellValues, context: Context) -> tuple[Tensors, Tensors]:
        """The new state and memory, without a graph.

        They are not rounded: a storage that rounds stores all results and recomputes none.
        """
        return self.update.values(self.parameters, self.module.update, *given, context)

    def mixed(self, streams: Streams, state: Tensors, context: Context) -> Streams:
        """The output streams for a new state, without a graph."""
        return self.mix.values(self.parameters, self.module.mix, streams, state, context)

    def moved(self) -> list[Tensor]:
        return [*self.update.moved(), *self.mix.moved()]

    def recall(self, moved: Sequence[Tensor]) -> Sequence[Tensor]:
        return self.mix.recall(self.update.recall(moved))

    def refuse_changes(self) -> None:
        if [p._version for p in self.parameters] != self._versions:
            raise RuntimeError(
                f"a parameter of a {type(self.module).__name__} was modified by an inplace operation between the forward and "
                f"the backward pass of its step: the step can no longer be recomputed"
            )


def _own(results: Tensors, aliases: CellValues, given: CellValues) -> Tensors:
    """The results, in which the tensor itself replaces an alias that the cell has returned unchanged."""
    own = {id(alias): tensor for alias, tensor in zip(chain(*aliases), chain(*given), strict=True)}
    return tuple([own.get(id(result), result) for result in results])


def _refuse_hooks(given: CellValues) -> None:
    if any([tensor._backward_hooks for tensor in (*given.state, *given.memory)]):
        raise RuntimeError(
            "it registers a hook on a state or memory that it is given: the hook would not see the gradients that reach that "
            "tensor from elsewhere. Register it on a tensor that the cell computes"
        )


def _check(method: str, what: str, new: object, old: Tensors) -> None:
    # Their dtypes may differ: under autocast a state may become narrower.
    if not isinstance(new, tuple) or [getattr(t, "shape", None) for t in new] != [t.shape for t in old]:
        found = [tuple(getattr(t, "shape", "?")) for t in new] if isinstance(new, tuple) else type(new).__name__
        expected = [tuple(t.shape) for t in old]
        raise ValueError(f"{method} must return {what} as a tuple of tensors of shapes {expected}; got {found}")


class StepInput(NamedTuple):
    """The arguments of one time step."""

    streams: Streams
    states: Sequence[Tensors]
    """The state of every cell."""
    memory: Tensors
    """The memory that enters the first cell."""
    context: Context

    @property
    def before(self) -> list[Tensor]:
        """The states and the memory in one list."""
        return [*chain(*self.states), *self.memory]


class Origin(NamedTuple):
    """The origin of the states and the memory before a time step."""

    end: Any
    """The `_StepEnd` of the step before; None if none of them comes from there."""
    places: list[int | None]
    """The place of each tensor among that step's results; None for a tensor that the step must save itself."""


class TimeStep:
    """The data that the autograd Functions of one time step share."""

    def __init__(
        self, cells: Sequence[RecurrentCell], given: StepInput, origin: Origin, storage: Storage, guard: Guard
    ) -> None:
        device = given.streams[0].device
        self.cells = [CellCall(cell, state, device) for cell, state in zip(cells, given.states, strict=True)]
        self.width, self.memory_size = len(given.streams), len(given.memory)
        self.arguments, self.draws = Arguments(given.context), Draws()
        self.storage, self.watch = storage, Watch(guard, storage.rounds)
        self.origin, before = origin, origin.end
        self.number: int = before.step.number + 1 if before is not None and before.step.storage is storage else 0
        """The number of steps before this one in an unbroken sequence."""
        self.is_stored = storage.stores(self.number)
        self.meter: StepMeter | None = None
        """Measures the forward pass; None if its costs are known, or not needed."""
        self.like: list[Like] = []
        """The dtypes and devices of its results."""
        self.like_saved = 0, 0, 0
        """The numbers of tensors that its end saves: its own states and memories, buffers, and values for the guard."""
        self._context_versions = [t._version for t in self.arguments.tensors]

    def rounded(self, tensors: Tensors) -> Tensors:
        return tuple(map(self.storage.rounded, tensors))

    def split(self, tensors: Sequence[Tensor], k: int) -> CellValues:
        """The first of the tensors that cell k takes or returns, by their kind."""
        a, b = self.width, self.width + self.cells[k].state_size
        return CellValues(tuple(tensors[:a]), tuple(tensors[a:b]), tuple(tensors[b : b + self.memory_size]))

    def by_cell(self, results: Sequence[Tensor]) -> list[tuple[Tensors, Tensors]]:
        """Every cell's new state and memory."""
        of_cells = []
        for cell in self.cells:
            a, b = cell.state_size, cell.state_size + self.memory_size
            of_cells.append((tuple(results[:a]), tuple(results[a:b])))
            results = results[b:]
        return of_cells

    def before_cells(self, before: Sequence[Tensor]) -> tuple[list[Tensors], Tensors]:
        """Every cell's state before the step, and the memory that enters the first cell."""
        states = []
        for cell in self.cells:
            states.append(tuple(before[: cell.state_size]))
            before = before[cell.state_size :]
        return states, tuple(before)

    def again(self, anchor: Streams, before: Sequence[Tensor]) -> Tensors:
        """The step's results, recomputed from its input streams, and the states and the memory `before` it."""
        context = self.arguments.filled(self.arguments.tensors)
        self._refuse_changes()
        states, memory = self.before_cells(before)
        streams, results = anchor, []
        for k, (cell, state) in enumerate(zip(self.cells, states, strict=True)):
            new, memory = cell.results(CellValues(streams, state, memory), context)
            results += [*new, *memory]
            if k + 1 < len(self.cells):
                streams = cell.mixed(streams, new, context)
        return tuple(results)

    def replay(
        self,
        now: BackwardPass,
        anchor: Streams,
        before: Sequence[Tensor],
        after: Sequence[Tensor],
        nodes: Sequence[Any],
    ) -> None:
        """Recompute the input of every cell that this backward pass will reach, and leave it for the cell in `now`.

        `before` and `after` are the states and memories around the step; `nodes` are the autograd nodes of the cells.
        """
        context = self.arguments.filled(self.arguments.tensors)
        self._refuse_changes()
        runs = [node is not None and is_going_to_run(node) for node in nodes]
        states, memory = self.before_cells(before)
        streams = anchor
        for k, (cell, state, (new, left)) in enumerate(zip(self.cells, states, self.by_cell(after), strict=True)):
            if runs[k]:
                now.given[self, k] = CellValues(streams, state, memory), (*new, *left)
            if any(runs[k + 1 :]):
                streams = cell.mixed(streams, new, context)
            memory = left

    def moved(self) -> list[Tensor]:
        """Buffers and attributes that the step has changed, as they were before, for autograd to save."""
        return [value for cell in self.cells for value in cell.moved()]

    def recall(self, moved: Sequence[Tensor]) -> None:
        """Restore the values that `moved` returned, for the second evaluations."""
        for cell in self.cells:
            moved = cell.recall(moved)

    def _refuse_changes(self) -> None:
        for cell in self.cells:
            cell.refuse_changes()
        if [t._version for t in self.arguments.tensors] != self._context_versions:
            raise RuntimeError(
                "a keyword argument of a step was modified by an inplace operation between its forward and its backward pass"
            )
