"""One time step of a recurrence, made to be undone: what it keeps, and how its backward pass rebuilds the rest.

A step passes its streams through K cells. Each of them has two parts: `update`, which is expensive, makes the cell's new
state; `mix`, which is cheap, makes the cell's output streams of its input streams and that state. A step keeps the streams
that it was given (the anchor), and the new states. Its backward pass first replays the mixes from the anchor, which gives
the input of every cell; then each cell, from the last to the first, is evaluated once more, with a graph. So an update runs
exactly twice a training step, a mix three times.

One autograd Function a cell, so that a cell's gradients go on while those of the cells before it are still to come; and one
that ends the step (`_End`). Whatever leads to a cell leads through the end of its step, which replays. The rules of the
tape in `_rewind` hold here too: a replay leaves streams only for cells that this backward is going to run, and each cell
takes its own off before it does anything else.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from revflow._calls import gradients, leaf
from revflow._guard import no_gradient_for, stranger_among
from revflow._passage import NAMED, Arguments, Context, Gradients, Streams, named
from revflow._replay import Draws, Replay
from revflow._rewind import alias_of, once, own_of

if TYPE_CHECKING:
    from revflow.recurrence import RecurrentCell

Tensors = tuple[Tensor, ...]


class Evaluated(NamedTuple):
    """What a cell returns."""

    streams: Streams
    state: Tensors
    memory: Tensors


class _Cell:
    """A cell's evaluation in one step."""

    def __init__(self, cell: RecurrentCell, device: torch.device) -> None:
        self.module = cell
        self.update, self.mix = Replay(cell, device), Replay(cell, device)
        self.parameters = self.update.parameters

    def first(self, draws: Draws, streams: Streams, state: Tensors, memory: Tensors, context: Context) -> Evaluated:
        versions = [s._version for s in streams]
        new_state, new_memory = self.update.first(draws, self.module.update, streams, state, memory, context)
        _check("update", "state", new_state, state)
        _check("update", "memory", new_memory, memory)
        mixed = self.mix.first(draws, self.module.mix, streams, new_state, context)
        _check("mix", "streams", mixed, streams)
        if [s._version for s in streams] != versions:
            raise RuntimeError("its streams were changed in place, which cannot be undone; let it work on a copy")
        return Evaluated(mixed, new_state, new_memory)

    def again(
        self, own: list[Tensor], streams: Streams, state: Tensors, memory: Tensors, context: Context
    ) -> Evaluated:
        """The same, with a graph."""
        state, memory = self.update.again(own, self.module.update, streams, state, memory, context)
        streams = self.mix.again(own, self.module.mix, streams, state, context)
        return Evaluated(streams, state, memory)

    def mixed(self, streams: Streams, state: Tensors, context: Context) -> Streams:
        """The output streams alone, of the new state; without a graph."""
        return self.mix.again(self.parameters, torch.no_grad()(self.module.mix), streams, state, context)


def _check(method: str, what: str, new: object, old: Tensors) -> None:
    # Not their dtypes: under autocast a state may become narrower.
    if not isinstance(new, tuple) or [getattr(t, "shape", None) for t in new] != [t.shape for t in old]:
        found = [tuple(getattr(t, "shape", "?")) for t in new] if isinstance(new, tuple) else type(new).__name__
        expected = [tuple(t.shape) for t in old]
        raise ValueError(f"{method} has to return {what} as a tuple of tensors of shapes {expected}; got {found}")


class _Step:
    """What the Functions of one step share."""

    def __init__(
        self, cells: Sequence[RecurrentCell], context: Context, device: torch.device, looked_at: set[int]
    ) -> None:
        self.looked_at = looked_at
        """The cells whose graphs were searched for tensors that would get no gradient."""
        self.cells = [_Cell(cell, device) for cell in cells]
        self.arguments = Arguments(context)
        self.draws = Draws()
        self._inputs: dict[tuple[int, int], Streams] = {}

    def replay(self, anchor: Streams, states: Sequence[Tensors], nodes: Sequence[Any]) -> None:
        """Leave the input streams of every cell that the running backward is going to run; `nodes` are the cells' own."""
        task, context = torch._C._current_graph_task_id(), self.arguments.filled(self.arguments.tensors)
        running = [node is not None and torch._C._will_engine_execute_node(node) for node in nodes]
        streams = anchor
        for k, cell in enumerate(self.cells):
            if running[k]:
                self._inputs[task, k] = streams
            if any(running[k + 1 :]):
                streams = cell.mixed(streams, states[k], context)

    def take(self, k: int) -> Streams:
        return self._inputs.pop((torch._C._current_graph_task_id(), k))

    def forget(self) -> None:
        """Drop what was left for cells that the running backward will not come to, since one before them has failed."""
        task = torch._C._current_graph_task_id()
        self._inputs = {key: streams for key, streams in self._inputs.items() if key[0] != task}


class _Call(NamedTuple):
    """Cell k in one step, and how many tensors of each kind it takes and returns."""

    step: _Step
    k: int
    streams: int
    state: int
    memory: int

    def parted(self, tensors: Sequence[Tensor]) -> Evaluated:
        """The first of them as streams, state and memory."""
        a, b = self.streams, self.streams + self.state
        return Evaluated(tuple(tensors[:a]), tuple(tensors[a:b]), tuple(tensors[b : b + self.memory]))


def run(
    cells: Sequence[RecurrentCell],
    streams: Streams,
    states: Sequence[Tensors],
    memory: Tensors,
    context: Context,
    looked_at: set[int],
) -> tuple[Streams, list[Tensors], list[Tensors]]:
    """Run a step: its output streams, and the new state and memory of every cell."""
    step = _Step(cells, context, streams[0].device, looked_at)
    anchor = tuple([s.detach() for s in streams])
    calls: list[_Call] = []
    results: list[Tensor] = []
    nodes: list[Any] = []
    for k, (cell, state) in enumerate(zip(step.cells, states, strict=True)):
        calls.append(_Call(step, k, len(streams), len(state), len(memory)))
        try:
            outputs: Tensors = _Update.apply(  # type: ignore[no-untyped-call]
                calls[k], *streams, *state, *memory, *step.arguments.tensors, *cell.parameters
            )
        except NAMED as error:
            raise named(error, f"cell {k}", cell.module, streams) from error
        nodes.append(next((o.grad_fn for o in outputs if o.grad_fn is not None), None))
        streams, new_state, memory = calls[k].parted(outputs)
        results += [*new_state, *memory]
    step.draws.end()
    if any(nodes):
        ended: Tensors = _End.apply(step, anchor, calls, nodes, *streams, *results)  # type: ignore[no-untyped-call]
        streams, results = ended[: len(streams)], [*ended[len(streams) :]]
    parted = _parted(calls, results)
    return streams, [state for state, _ in parted], [memory for _, memory in parted]


def _parted(calls: Sequence[_Call], results: Sequence[Tensor]) -> list[tuple[Tensors, Tensors]]:
    """Every cell's state and memory."""
    rest = iter(results)
    return [(tuple(islice(rest, call.state)), tuple(islice(rest, call.memory))) for call in calls]


class _Update(torch.autograd.Function):
    """A cell in one step."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> Tensors:
        step, cell = call.step, call.step.cells[call.k]
        streams, state, memory = call.parted(tensors)
        count = call.streams + call.state + call.memory
        context = step.arguments.filled(tensors[count : len(tensors) - len(cell.parameters)])
        ctx.call, ctx.layout = call, [s.stride() for s in streams]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[call.streams :])  # all but the streams
        return tuple(itertools.chain(*cell.first(step.draws, streams, state, memory, context)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        if torch.is_grad_enabled():
            return once(_rewind, ctx, grads, [g for g in grads if g is not None])
        return _rewind(ctx, grads)


def _rewind(ctx: Any, grads: Gradients) -> Gradients:
    call: _Call = ctx.call
    streams = call.step.take(call.k)
    try:
        return (None, *_evaluated_again(call, ctx, streams, grads))
    except BaseException:
        call.step.forget()
        raise


def _evaluated_again(call: _Call, ctx: Any, streams: Streams, grads: Gradients) -> Gradients:
    """The gradients of all that the cell was given, its parameters included."""
    step, cell = call.step, call.step.cells[call.k]
    saved: Tensors = ctx.saved_tensors
    begin = len(saved) - len(cell.parameters)
    inputs = [*map(leaf, streams, ctx.layout, ctx.needs_input_grad[1:])]
    inputs += [alias_of(t) for t in saved[:begin]]
    own = own_of(saved[begin:])
    context = step.arguments.filled(inputs[call.streams + call.state + call.memory :])
    outputs = tuple(itertools.chain(*cell.again(own, *call.parted(inputs), context)))
    if call.k not in step.looked_at:
        stranger = stranger_among(outputs, (*inputs, *own))
        if stranger is not None:
            raise RuntimeError(f"cell {call.k} ({type(cell.module).__name__}) uses {no_gradient_for(stranger)}")
        step.looked_at.add(call.k)
    return gradients(outputs, (*inputs, *own), grads)


class _End(torch.autograd.Function):
    """The end of a step: keeps its anchor and its new states, and replays its mixes when the backward pass comes to it."""

    @staticmethod
    def forward(
        ctx: Any, step: _Step, anchor: Streams, calls: Sequence[_Call], nodes: Sequence[Any], *tensors: Tensor
    ) -> Tensors:
        ctx.step, ctx.calls, ctx.nodes = step, calls, nodes
        ctx.set_materialize_grads(False)
        outputs = tuple([t.view_as(t) for t in tensors])
        ctx.save_for_backward(*anchor, *outputs[len(anchor) :])
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        if torch.is_grad_enabled():
            return once(_begin, ctx, grads, ctx.saved_tensors)
        return _begin(ctx, grads)


def _begin(ctx: Any, grads: Gradients) -> Gradients:
    saved: Tensors = ctx.saved_tensors
    count = ctx.calls[0].streams
    states = [state for state, _ in _parted(ctx.calls, saved[count:])]
    ctx.step.replay(saved[:count], states, ctx.nodes)
    return (None,) * 4 + tuple(grads)
