"""One time step of a recurrence: what it is made of, and its parts as a backward pass runs them again.

A step passes its streams through K cells. Each of them has two parts: `update`, which is expensive, makes the cell's new
state; `mix`, which is cheap, makes the cell's output streams of its input streams and that state. The new states and
memories of all cells are the step's results.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from revflow._base.streams import Context, Streams, Tensors
from revflow._base.torch_private import is_going_to_run
from revflow._guard.policy import Guard
from revflow._guard.recurrences import Watch
from revflow._replay.arguments import Arguments
from revflow._replay.random_states import Draws
from revflow._replay.replay import Replay
from revflow._rewind.graph import aliases_of
from revflow._through_time.passes import BackwardPass
from revflow._through_time.states import Kept, Like
from revflow.cell import RecurrentCell


class Evaluated(NamedTuple):
    """What a cell is given, or returns."""

    streams: Streams
    state: Tensors
    memory: Tensors


class Cell:
    """A cell's evaluation in one step."""

    def __init__(self, cell: RecurrentCell, state: Tensors, device: torch.device) -> None:
        self.module = cell
        self.state_size = len(state)
        self.update, self.mix = Replay(cell, device), Replay(cell, device)
        self.parameters = self.update.parameters
        self._versions = [p._version for p in self.parameters]

    def first(self, step: Step, given: Evaluated, context: Context) -> Evaluated:
        taken = [*chain(*given)]
        versions = [t._version for t in taken]
        reachable = step.arguments.watch(context)
        # Hooks that it registers on its arguments belong to this evaluation alone.
        aliases = Evaluated(*[tuple(aliases_of(tensors)) for tensors in given])
        state, memory = self.update.first(step.draws, self.module.update, *aliases, context)
        _refuse_hooks(aliases)
        _check("update", "state", state, given.state)
        _check("update", "memory", memory, given.memory)
        state, memory = _own(state, aliases, given), _own(memory, aliases, given)
        state, memory = step.rounded(state), step.rounded(memory)
        taken += state  # which mix is given
        versions += [t._version for t in state]
        given, aliases = Evaluated(given.streams, state, ()), Evaluated(aliases.streams, tuple(aliases_of(state)), ())
        streams = self.mix.first(step.draws, self.module.mix, aliases.streams, aliases.state, context)
        _check("mix", "streams", streams, given.streams)
        streams = _own(streams, aliases, given)
        if reachable is not None:
            reachable.refuse_changes(self.module)
        if [t._version for t in taken] != versions:
            raise RuntimeError(
                "its streams, its state or its memory were changed in place, which cannot be undone; let it work on a copy"
            )
        return Evaluated(streams, state, memory)

    def again(self, own: list[Tensor], step: Step, given: Evaluated, context: Context) -> Evaluated:
        """The same, with a graph."""
        state, memory = self.update.again(own, self.module.update, *given, context)
        with torch.enable_grad():
            state, memory = step.rounded(state), step.rounded(memory)
        return Evaluated(self.mix.again(own, self.module.mix, given.streams, state, context), state, memory)

    def results(self, given: Evaluated, context: Context) -> tuple[Tensors, Tensors]:
        """The new state and memory; without a graph. As `update` returns them: what is rounded is kept, not computed again."""
        return self.update.values(self.parameters, self.module.update, *given, context)

    def mixed(self, streams: Streams, state: Tensors, context: Context) -> Streams:
        """The output streams, of the new state; without a graph."""
        return self.mix.values(self.parameters, self.module.mix, streams, state, context)

    def moved(self) -> list[Tensor]:
        return [*self.update.moved(), *self.mix.moved()]

    def recall(self, moved: Sequence[Tensor]) -> Sequence[Tensor]:
        return self.mix.recall(self.update.recall(moved))

    def refuse_changes(self) -> None:
        if [p._version for p in self.parameters] != self._versions:
            raise RuntimeError(
                f"a parameter of a {type(self.module).__name__} was modified by an inplace operation between the forward and "
                f"the backward pass of its step: the step can no longer be rebuilt"
            )


def _own(results: Tensors, aliases: Evaluated, given: Evaluated) -> Tensors:
    """The results, in which what a cell returns as it was given is no alias."""
    own = {id(alias): tensor for alias, tensor in zip(chain(*aliases), chain(*given), strict=True)}
    return tuple([own.get(id(result), result) for result in results])


def _refuse_hooks(given: Evaluated) -> None:
    if any([tensor._backward_hooks for tensor in (*given.state, *given.memory)]):
        raise RuntimeError(
            "it registers a hook on a state or memory that it is given: the hook would not see the gradients that reach that "
            "tensor from elsewhere. Register it on a tensor that the cell computes"
        )


def _check(method: str, what: str, new: object, old: Tensors) -> None:
    # Not their dtypes: under autocast a state may become narrower.
    if not isinstance(new, tuple) or [getattr(t, "shape", None) for t in new] != [t.shape for t in old]:
        found = [tuple(getattr(t, "shape", "?")) for t in new] if isinstance(new, tuple) else type(new).__name__
        expected = [tuple(t.shape) for t in old]
        raise ValueError(f"{method} has to return {what} as a tuple of tensors of shapes {expected}; got {found}")


class Begin(NamedTuple):
    """The states, and the memory that enters the first cell, before a step."""

    end: Any
    """The `_StepEnd` of the step before; None if nothing comes from there."""
    places: list[int | None]
    """Of each tensor the place among that step's results; None for those that the step has to save itself."""


class Step:
    """What the Functions of one step share."""

    def __init__(
        self,
        cells: Sequence[RecurrentCell],
        streams: Streams,
        states: Sequence[Tensors],
        memory: Tensors,
        context: Context,
        begin: Begin,
        keeping: Kept,
        guard: Guard,
    ) -> None:
        self.cells = [Cell(cell, state, streams[0].device) for cell, state in zip(cells, states, strict=True)]
        self.width, self.memory_size = len(streams), len(memory)
        self.arguments, self.draws = Arguments(context), Draws()
        self.keeping, self.watch = keeping, Watch(guard, keeping.rounds)
        self.begin, before = begin, begin.end
        self.number: int = before.step.number + 1 if before is not None and before.step.keeping is keeping else 0
        """How many steps were run before this one without a break."""
        self.keeps = keeping.keeps(self.number)
        self.like: list[Like] = []
        """Of its results."""
        self.like_saved = 0, 0, 0
        """How many states and memories of its own its end saves, how many buffers, and how many values for the guard."""
        self._context_versions = [t._version for t in self.arguments.tensors]

    def rounded(self, tensors: Tensors) -> Tensors:
        return tuple(map(self.keeping.rounded, tensors))

    def parted(self, tensors: Sequence[Tensor], k: int) -> Evaluated:
        """Of the tensors that cell k takes or returns, the first ones."""
        a, b = self.width, self.width + self.cells[k].state_size
        return Evaluated(tuple(tensors[:a]), tuple(tensors[a:b]), tuple(tensors[b : b + self.memory_size]))

    def by_cell(self, results: Sequence[Tensor]) -> list[tuple[Tensors, Tensors]]:
        """Every cell's new state and memory."""
        parted = []
        for cell in self.cells:
            a, b = cell.state_size, cell.state_size + self.memory_size
            parted.append((tuple(results[:a]), tuple(results[a:b])))
            results = results[b:]
        return parted

    def before_cells(self, before: Sequence[Tensor]) -> tuple[list[Tensors], Tensors]:
        """Every cell's state before the step, and the memory that enters the first cell."""
        states = []
        for cell in self.cells:
            states.append(tuple(before[: cell.state_size]))
            before = before[cell.state_size :]
        return states, tuple(before)

    def again(self, anchor: Streams, before: Sequence[Tensor]) -> Tensors:
        """The step's results, computed once more."""
        context = self.arguments.filled(self.arguments.tensors)
        self._refuse_changes()
        states, memory = self.before_cells(before)
        streams, results = anchor, []
        for k, (cell, state) in enumerate(zip(self.cells, states, strict=True)):
            new, memory = cell.results(Evaluated(streams, state, memory), context)
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
        """Lay aside, for every cell that this backward pass is going to run, what it was given and what it returned; `nodes`
        are the cells' own."""
        context = self.arguments.filled(self.arguments.tensors)
        self._refuse_changes()
        runs = [node is not None and is_going_to_run(node) for node in nodes]
        states, memory = self.before_cells(before)
        streams = anchor
        for k, (cell, state, (new, left)) in enumerate(zip(self.cells, states, self.by_cell(after), strict=True)):
            if runs[k]:
                now.given[self, k] = Evaluated(streams, state, memory), (*new, *left)
            if any(runs[k + 1 :]):
                streams = cell.mixed(streams, new, context)
            memory = left

    def moved(self) -> list[Tensor]:
        """Buffers and attributes that the step has changed, as they were before, for autograd to save."""
        return [value for cell in self.cells for value in cell.moved()]

    def recall(self, moved: Sequence[Tensor]) -> None:
        """Bring them back."""
        for cell in self.cells:
            moved = cell.recall(moved)

    def _refuse_changes(self) -> None:
        for cell in self.cells:
            cell.refuse_changes()
        if [t._version for t in self.arguments.tensors] != self._context_versions:
            raise RuntimeError(
                "a keyword argument of a step was modified by an inplace operation between its forward and its backward pass"
            )
