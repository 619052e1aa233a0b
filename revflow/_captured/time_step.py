"""The call of a recurrence's time step, as torch.compile traces it: from its bytecode, it sees each cell once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, islice
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

from revflow._base.streams import CellValues, Context, Streams, Tensors
from revflow._base.torch_capture import CAN_BE_CAPTURED, break_graph, erase_unused_nodes, last_node, warn_of_old_release
from revflow._base.user_warnings import warn
from revflow._captured.call import Path, located, register, tensor_at
from revflow._captured.given import Given, constants_of, filled_without_data, kind_of, made, objection_to
from revflow._captured.step_function import StepCall, run_step
from revflow._captured.watch import ObjectionError, evaluated_without_data, objections_to, refuse_hooks, watched
from revflow._replay.autocast import autocast_state
from revflow.cell import RecurrentState

OUTSIDE = "a time step of a ReversibleRecurrence runs outside of this compiled graph: {}"


class Survey(NamedTuple):
    """The result of the check of whether a time step can be captured."""

    objection: str = ""
    """The reason why it cannot; empty if it can."""
    number: int = -1
    """Of the call, for `call.registered`."""
    paths: tuple[Path, ...] = ()
    """The tensors of all cells, each once."""


def captured_step(
    recurrence: nn.ModuleList, streams: Streams, state: RecurrentState, context: Context, objection: str
) -> tuple[Streams, list[tuple[Tensors, Tensors]]] | None:
    """The output streams of a time step, as a part of the graph that PyTorch traces, and each cell's new state and memory.

    None if that is not possible, as with an `objection`. The graph then ends before this call, which is an error with
    `fullgraph=True`.
    """
    if not CAN_BE_CAPTURED:
        warn_of_old_release()
        return None
    memory = state.memories[-1]
    found = _survey(recurrence, streams, state, context, objection)
    if found.objection:
        break_graph(OUTSIDE.format(found.objection))
        return None
    before = last_node()
    _observe(recurrence, CellValues(streams, (), memory), state.cells, context)
    observed = last_node()
    leaves = [value for value in context.values() if isinstance(value, Tensor)]
    own = [tensor_at(recurrence, path) for path in found.paths]
    results = run_step(found.number, *streams, *chain(*state.cells), *memory, *leaves, *own)
    erase_unused_nodes(before, observed)
    outputs, of_cells, place = tuple(results[: len(streams)]), [], len(streams)
    for before in state.cells:
        middle, end = place + len(before), place + len(before) + len(memory)
        of_cells.append((tuple(results[place:middle]), tuple(results[middle:end])))
        place = end
    return outputs, of_cells


def _observe(recurrence: nn.ModuleList, given: CellValues, states: Sequence[Tensors], context: Context) -> None:
    """Let PyTorch see the bytecode of every cell. See `chain._observe`."""
    with torch.no_grad():
        cells: list[Any] = [*recurrence]
        for cell, state in zip(cells, states, strict=True):
            cell.update(given.streams, state, given.memory, context)
            cell.mix(given.streams, state, context)


def _survey(
    recurrence: nn.ModuleList, streams: Streams, state: RecurrentState, context: Context, objection: str
) -> Survey:
    tensors, others = constants_of(context)
    objection = objection or objection_to(others)
    kinds = tuple([kind_of(t) for t in (*streams, *chain(*state.cells), *state.memories[-1])])
    sizes = tuple([len(tensors) for tensors in state.cells])
    counts = len(streams), sizes, len(state.memories[-1])
    return Survey(*_surveyed(recurrence, objection, counts, kinds, (tensors, () if objection else others)))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _surveyed(
    recurrence: nn.ModuleList,
    objection: str,
    counts: tuple[int, tuple[int, ...], int],
    kinds: tuple[tuple[Any, ...], ...],
    context: tuple[tuple[tuple[Any, ...], ...], tuple[tuple[str, Any], ...]],
) -> tuple[Any, ...]:
    """The fields of a `Survey`. PyTorch takes the result as a constant, so the arguments are constants too.

    `counts` are the numbers of streams, of tensors in each cell's state, and in the memory. `kinds` has the fields of a `Given`
    for each of these tensors, and `context` is the result of `constants_of`.
    """
    (width, sizes, memory_size), (tensors, others) = counts, context
    try:
        if objection:
            raise ObjectionError(objection)
        filled = {name: Given(*given) for name, *given in tensors} | dict(others)
        _survey_of_cells(recurrence, counts, [Given(*kind) for kind in kinds], filled)
    except ObjectionError as found:
        warn(OUTSIDE.format(found), UserWarning)
        return (str(found),)
    paths, _, places = located([*recurrence._modules.items()])
    device = kinds[0][2]
    names, state = tuple([name for name, *_ in tensors]), tuple(autocast_state(device))
    call = StepCall(ref(recurrence), width, sizes, memory_size, names, dict(others), state, device, places)
    return "", register(call, recurrence), tuple(paths)


def _survey_of_cells(
    recurrence: nn.ModuleList, counts: tuple[int, tuple[int, ...], int], kinds: list[Given], context: dict[str, Any]
) -> None:
    """ObjectionError if an evaluation of a cell does more than to compute its results."""
    if not all([given.dtype.is_floating_point for given in kinds]):
        raise ObjectionError("a stream, a state or a memory does not consist of floating-point numbers")
    width, sizes, memory_size = counts
    with evaluated_without_data(recurrence, kinds[0].device):
        rest, filled = iter([made(given) for given in kinds]), filled_without_data(context)
        streams, states = tuple(islice(rest, width)), [tuple(islice(rest, size)) for size in sizes]
        memory = tuple(islice(rest, memory_size))
        for (name, cell), state in zip(recurrence._modules.items(), states, strict=True):
            inputs = (*streams, *state, *memory, *[v for v in filled.values() if isinstance(v, Tensor)])
            with objections_to(f"cell {name}", cell):
                refuse_hooks(cell)
                given = CellValues(streams, state, memory)
                moving, results = watched(cell, cell, lambda: _evaluated(cell, given, filled), inputs)  # noqa: B023
                if moving:
                    raise ObjectionError(f"it changes the buffer {moving[0]} in place")
            results = tuple([t.detach().requires_grad_() for t in results])
            streams, memory = results[:width], results[len(results) - memory_size :]


def _evaluated(cell: Any, given: CellValues, context: Context) -> Tensors:
    state, memory = cell.update(*given, context)
    streams = cell.mix(given.streams, state, context)
    found, expected = [[t.shape for t in tensors] for tensors in ((*state, *memory), (*given.state, *given.memory))]
    if found != expected:
        raise ValueError(f"update must return tensors of shapes {expected}; got {found}")
    return (*streams, *state, *memory)
