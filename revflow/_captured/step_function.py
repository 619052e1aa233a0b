"""A time step of a recurrence as one autograd Function, of which torch.compile compiles both passes.

It saves its arguments and its results. The backward pass first replays the mixes, which gives the input of every cell. Then each
cell, from the last to the first, is evaluated again for its gradients. Equal cells are compiled once.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from revflow._base.streams import CellValues, Context, Gradients, Tensors
from revflow._base.torch_capture import call_uninlined
from revflow._captured import region
from revflow._captured.call import registered
from revflow._captured.function import separate
from revflow._captured.passes import Found, dense, gradients, leaf, summed
from revflow._captured.structure import structure_of
from revflow._captured.tensors import holders_of, holding
from revflow._replay.autocast import autocast
from revflow.cell import RecurrentCell


class StepCall(NamedTuple):
    """One time step in a compiled graph. It has no reference to a module: compiled code may outlive the recurrence."""

    recurrence: weakref.ref[nn.ModuleList]
    width: int
    """The number of streams."""
    sizes: tuple[int, ...]
    """By cell: the number of tensors in its state."""
    memory_size: int
    names: tuple[str, ...]
    """Of the tensors among the keyword arguments."""
    others: Context
    """The keyword arguments that are not tensors."""
    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    device: torch.device
    places: tuple[tuple[int, ...], ...]
    """By cell: the places of its tensors among those of the call. Each is there once."""

    @property
    def cells(self) -> list[Cell]:
        recurrence = self.recurrence()
        assert recurrence is not None, "compiled code runs only as long as its modules exist"
        return [Cell(self, cell, k) for k, cell in enumerate(recurrence)]  # type: ignore[arg-type]

    def values(self, tensors: Iterator[Tensor], k: int) -> CellValues:
        """The next of the tensors, as the streams, the state and the memory of cell k."""
        counts = self.width, self.sizes[k], self.memory_size
        return CellValues(*[tuple(islice(tensors, count)) for count in counts])


class Cell:
    """A cell in one call, and its functions of the streams, the state, the memory, keyword arguments, and its own tensors."""

    def __init__(self, call: StepCall, module: RecurrentCell, k: int) -> None:
        self._call, self._module, self._k = call, module, k
        self.places = [*dict.fromkeys(call.places[k])]
        """The places of its tensors among those of the call."""
        self._numbers = [self.places.index(place) for place in call.places[k]]
        options = call.width, call.sizes[k], call.memory_size, call.names, tuple(call.others.items()), call.autocast
        self._kind: Hashable = structure_of(module), tuple(self._numbers), options

    def first(self, given: CellValues, leaves: Sequence[Tensor], own: Sequence[Tensor]) -> CellValues:
        """The output streams, and the new state and memory."""
        results = region.call(("cell", self._kind), self._first, [*chain(*given), *leaves, *own])
        return self._call.values(iter(results), self._k)  # type: ignore[arg-type]

    def mixed(self, streams: Tensors, state: Tensors, leaves: Sequence[Tensor], own: Sequence[Tensor]) -> Tensors:
        """The output streams for a new state."""
        results = region.call(("mix", self._kind), self._mixed, [*streams, *state, *leaves, *own])
        return tuple(results)  # type: ignore[arg-type]

    def gradients(
        self,
        given: CellValues,
        grads: CellValues,
        leaves: Sequence[Tensor],
        own: Sequence[Tensor],
        needs: Sequence[bool],
    ) -> tuple[CellValues, list[Tensor | None]]:
        """The gradients of what is given, and those of the keyword arguments and its own tensors that `needs` selects."""
        function, operands = partial(self._gradients, needs), [*chain(*given), *chain(*grads), *leaves, *own]
        results = iter(region.call(("gradients", self._kind, tuple(needs)), function, operands))
        return self._call.values(results, self._k), [*results]  # type: ignore[arg-type]

    def _first(self, *tensors: Tensor) -> Tensors:
        rest = iter(tensors)
        return self._evaluated(self._call.values(rest, self._k), [*rest])

    def _mixed(self, *tensors: Tensor) -> Tensors:
        rest = iter(tensors)
        streams, state = tuple(islice(rest, self._call.width)), tuple(islice(rest, self._call.sizes[self._k]))
        with self._holding([*rest]) as context:
            return tuple(map(dense, self._module.mix(streams, state, context)))

    def _gradients(self, needs: Sequence[bool], *tensors: Tensor) -> Found:
        rest = iter(tensors)
        inputs, grads = ([*chain(*self._call.values(rest, self._k))] for _ in range(2))
        with torch.no_grad():
            inputs = [*map(leaf, inputs)]
            others = [leaf(t) if need else t for t, need in zip(rest, needs, strict=True)]
            with torch.enable_grad():
                stand_ins = self._call.values(iter(inputs), self._k)
                outputs = self._evaluated(stand_ins, others)
            wanted = [t for t, need in zip(others, needs, strict=True) if need]
            found = iter(gradients(outputs, grads, [*inputs, *wanted]))
            of_inputs = [torch.zeros_like(t) if g is None else dense(g) for t, g in zip(inputs, found, strict=False)]
        return [*of_inputs, *[next(found) if need else None for need in needs]]

    def _evaluated(self, given: CellValues, others: Sequence[Tensor]) -> Tensors:
        with self._holding(others) as context:
            state, memory = self._module.update(*given, context)
            streams = self._module.mix(given.streams, state, context)
        return tuple(map(dense, (*streams, *state, *memory)))

    @contextmanager
    def _holding(self, others: Sequence[Tensor]) -> Iterator[Context]:
        """A context in which the cell has its own tensors of `others`. It gives the keyword arguments, which are first."""
        call, count = self._call, len(self._call.names)
        own = others[count:]
        holders = holders_of(self._module)
        with autocast([*call.autocast], call.device), holding(self._module, holders, [own[k] for k in self._numbers]):
            yield call.others | dict(zip(call.names, others[:count], strict=True))


class CapturedStep(torch.autograd.Function):
    """All cells of a time step.

    The arguments are the number of the call, the streams, the states, the memory, the tensors among the keyword arguments, and
    those of the cells. It returns the output streams, and the new state and memory of each cell.
    """

    @staticmethod
    def forward(ctx: Any, number: int, *tensors: Tensor) -> Tensors:
        call: StepCall = registered(number)
        cells, rest = call.cells, iter(tensors)
        anchor = streams = tuple(map(dense, islice(rest, call.width)))
        states = [tuple(islice(rest, size)) for size in call.sizes]
        entering = memory = tuple(islice(rest, call.memory_size))
        leaves = [*islice(rest, len(call.names))]
        own, results = [*rest], []
        for cell, state in zip(cells, states, strict=True):
            given = CellValues(streams, state, memory)
            streams, new, memory = cell.first(given, leaves, [own[k] for k in cell.places])
            results += [*new, *memory]
        ctx.call, ctx.cells = call, cells
        ctx.needs = ctx.needs_input_grad[-len(leaves) - len(own) :] if leaves or own else ()
        ctx.save_for_backward(*anchor, *chain(*states), *entering, *results, *leaves, *own)
        return (*streams, *results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        call: StepCall = ctx.call
        saved = iter(ctx.saved_tensors)
        streams = tuple([separate(s, grads[0]) for s in islice(saved, call.width)])
        states = [tuple(islice(saved, size)) for size in call.sizes]
        memory = tuple(islice(saved, call.memory_size))
        results = [(tuple(islice(saved, size)), tuple(islice(saved, call.memory_size))) for size in call.sizes]
        leaves = [*islice(saved, len(call.names))]
        own, given = [*saved], []
        for k, (cell, state, (new, left)) in enumerate(zip(ctx.cells, states, results, strict=True)):
            given.append(CellValues(streams, state, memory))
            if k + 1 < len(ctx.cells):
                streams = cell.mixed(streams, new, leaves, [own[j] for j in cell.places])
            memory = left
        return None, *_gradients(ctx, given, iter(grads), leaves, own)


def _gradients(
    ctx: Any, given: list[CellValues], grads: Iterator[Tensor], leaves: list[Tensor], own: list[Tensor]
) -> list[Tensor | None]:
    """The gradients of all tensor arguments, from what each cell is given."""
    call, count = ctx.call, len(leaves)
    its = tuple(map(dense, islice(grads, call.width)))
    of_results = [(tuple(islice(grads, size)), tuple(islice(grads, call.memory_size))) for size in call.sizes]
    of_memory: Tensors = ()
    of_states: list[Tensors] = []
    sums: list[Tensor | None] = [None] * len(ctx.needs)
    for cell, values, (of_state, of_left) in reversed([*zip(ctx.cells, given, of_results, strict=True)]):
        of_left = tuple([a + b for a, b in zip(of_left, of_memory, strict=True)]) if of_memory else of_left
        places = [*range(count), *[count + k for k in cell.places]]
        needs = [ctx.needs[k] for k in places]
        of_given = CellValues(its, tuple(map(dense, of_state)), tuple(map(dense, of_left)))
        (its, *of_before), found = cell.gradients(values, of_given, leaves, [own[k] for k in cell.places], needs)
        of_states, of_memory = [of_before[0], *of_states], of_before[1]
        for k, gradient in zip(places, found, strict=True):
            sums[k] = summed(sums[k], gradient)
    return [*its, *chain(*of_states), *of_memory, *sums]


@call_uninlined
def run_step(number: int, *tensors: Tensor) -> Tensors:
    """The results of the call with this number. See `CapturedStep`."""
    results: Tensors = CapturedStep.apply(number, *tensors)  # type: ignore[no-untyped-call]
    return results
