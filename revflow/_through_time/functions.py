"""The autograd Functions of a recurrence: what each time step keeps, and how its backward pass rebuilds the rest.

A step keeps the streams that it was given (the anchor), and its results as `states` says. Its backward pass first
replays the mixes from the anchor, which gives the input of every cell; then each cell, from the last to the first, is
evaluated once more, with a graph. So an update runs exactly twice a training step, a mix three times. Where the results of
a step were not kept they are computed again, from the last ones that were: both run once more.

One Function a cell, so that a cell's gradients go on while those of the cells before it are still to come; and one
that ends the step (`_StepEnd`). Whatever leads to a cell leads through its step's end, which replays. The states that a
step begins with are, in most cases, the results of the step before: they are found by the tensors' `grad_fn`, which is that
step's end, and are not saved twice. What a backward pass lays aside is in its `passes.BackwardPass`, and gone with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor

from revflow._base.errors import BLOCK_ERRORS, with_place
from revflow._base.second_derivative import once
from revflow._base.streams import Context, Gradients, Streams, Tensors
from revflow._base.torch_private import is_going_to_run
from revflow._guard.policy import Guard
from revflow._replay.refusals import refuse_compiled_autograd
from revflow._rewind.graph import alias_of, leaf, not_leaves
from revflow._through_time.passes import BackwardPass, running
from revflow._through_time.states import Kept, Unpacked
from revflow._through_time.steps import Begin, Step
from revflow.cell import RecurrentCell


def run(
    cells: Sequence[RecurrentCell],
    streams: Streams,
    states: Sequence[Tensors],
    memory: Tensors,
    context: Context,
    keeping: Kept,
    guard: Guard,
) -> tuple[Streams, list[tuple[Tensors, Tensors]]]:
    """Run a step: its output streams, and the new state and memory of every cell."""
    begin = _begin_with([*chain(*states), *memory])
    step = Step(cells, streams, states, memory, context, begin, keeping, guard)
    anchor = tuple([s.detach() for s in streams])
    own = [t.detach() for t, p in zip((*chain(*states), *memory), step.begin.places, strict=True) if p is None]
    results: list[Tensor] = []
    nodes: list[Any] = []
    for k, (cell, state) in enumerate(zip(step.cells, states, strict=True)):
        try:
            outputs: Tensors = _Update.apply(  # type: ignore[no-untyped-call]
                step, k, *streams, *state, *memory, *step.arguments.tensors, *cell.parameters
            )
        except BLOCK_ERRORS as error:
            raise with_place(error, f"cell {k}", cell.module, streams) from error
        nodes.append(next((o.grad_fn for o in outputs if o.grad_fn is not None), None))
        streams, state, memory = step.parted(outputs, k)
        results += [*state, *memory]
    step.draws.end()
    if any(nodes):
        step.like = [(t.dtype, t.device) for t in results]
        leaving = step.watch.see(tuple([s.detach() for s in streams]))
        moved = step.moved()
        saved = (*anchor, *own, *moved, *leaving)
        step.like_saved = len(own), len(moved), len(leaving)
        ended: Tensors = _StepEnd.apply(step, nodes, saved, *streams, *results)  # type: ignore[no-untyped-call]
        streams, results = ended[: len(streams)], [*ended[len(streams) : -1]]
    return streams, step.by_cell(results)


def _begin_with(tensors: Sequence[Tensor]) -> Begin:
    ends = [_end_of(t) for t in tensors]
    end = next(filter(None, ends), None)
    places = [
        t.output_nr - end.step.width if end and its is end else None for t, its in zip(tensors, ends, strict=True)
    ]
    return Begin(end, places)


def _end_of(tensor: Tensor) -> Any:
    """The `_StepEnd` that this is a result of; None for anything else, the streams that left a step too."""
    node: Any = tensor.grad_fn
    is_end: bool = isinstance(node, _StepEnd._backward_cls)
    return node if is_end and tensor.output_nr >= node.step.width else None


class _Update(torch.autograd.Function):
    """A cell in one step."""

    @staticmethod
    def forward(ctx: Any, step: Step, k: int, *tensors: Tensor) -> Tensors:
        cell, given = step.cells[k], step.parted(tensors, k)
        inputs = [*chain(*given)]
        context = step.arguments.filled(tensors[len(inputs) : len(tensors) - len(cell.parameters)])
        ctx.step, ctx.k, ctx.layout = step, k, [t.stride() for t in inputs]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[len(inputs) :])
        with step.watch.remember(f"cell {k}", cell.update):
            return tuple(chain(*cell.first(step, given, context)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        if torch.is_grad_enabled():
            return once(_rewind, ctx, grads, [g for g in grads if g is not None])
        return _rewind(ctx, grads)


def _rewind(ctx: Any, grads: Gradients) -> Gradients:
    """The gradients of all that the cell was given, its parameters included."""
    step, k = ctx.step, ctx.k
    cell, now, saved = step.cells[k], running(), ctx.saved_tensors
    given, expected = now.given.pop((step, k))
    name = f"cell {k} ({type(cell.module).__name__})"
    begin = len(saved) - len(cell.parameters)
    inputs = [*map(leaf, chain(*given), ctx.layout, ctx.needs_input_grad[2:]), *map(alias_of, saved[:begin])]
    own = [*map(alias_of, saved[begin:])]
    entering = not_leaves(inputs)
    context = step.arguments.filled(entering[len(ctx.layout) :])
    followed = step.watch.follow(cell.update)
    with followed or nullcontext():
        returned = cell.again(own, step, step.parted(entering, k), context)
    del entering, context
    outputs = tuple(chain(*returned))
    is_last = k + 1 == len(step.cells)
    step.watch.look(
        now.found, name, cell.update, expected, outputs[step.width :], returned.streams if is_last else None
    )
    step.watch.graph(name, outputs, (*inputs, *own), cell.module, step.arguments)
    del returned
    earlier_step = _earlier_step(ctx, now)
    sums = now.sums.pop((step, k), None)
    if (
        earlier_step is not None and (earlier_step, k) in now.sums
    ):  # from another step that went on from the same states
        sums = _summed(now.sums.pop((earlier_step, k)), sums)
    _add_gradients(outputs, [*inputs, *own], grads, sums)
    del outputs
    step.watch.escaped(name, followed, (*cell.update.escaped, *cell.mix.escaped))
    own_grads = [p.grad for p in own]
    now.done.add((step, k))
    if earlier_step is not None:
        now.sums[earlier_step, k], own_grads = own_grads, [None] * len(own)
    return (None, None, *[t.grad for t in inputs], *own_grads)


def _add_gradients(outputs: Tensors, leaves: list[Tensor], grads: Gradients, sums: list[Tensor | None] | None) -> None:
    """Leave each leaf's gradient in its `grad`; those of the last leaves, the parameters, added to `sums`.

    One operation after the other, each to its sum: there are never a whole cell's gradients beside the sums.
    """
    if sums is not None:
        for parameter, its_sum in zip(leaves[-len(sums) :], sums, strict=True):
            parameter.grad = its_sum
    known = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
    wanted = [t for t in leaves if t.requires_grad]
    if known and wanted:
        torch.autograd.backward([o for o, _ in known], [g for _, g in known], inputs=wanted)


def _summed(a: list[Tensor | None], b: list[Tensor | None] | None) -> list[Tensor | None]:
    if b is None:
        return a
    return [y if x is None else x if y is None else x.add_(y) for x, y in zip(a, b, strict=True)]


def _earlier_step(ctx: Any, now: BackwardPass) -> Step | None:
    """The step before this one whose evaluation of the same cell is still to come in this backward pass: its parameters'
    gradients take this step's in. None if this is the last."""
    k, end = ctx.k, ctx.step.begin.end
    while end is not None:
        node = end.nodes[k] if k < len(end.nodes) else None
        if (
            node is not None
            and _has_parameters_of(node, ctx)
            and (end.step, k) not in now.done
            and is_going_to_run(node)
        ):
            return end.step  # type: ignore[no-any-return]
        end = end.step.begin.end
    return None


def _has_parameters_of(node: Any, other: Any) -> bool:
    """Whether two evaluations of a cell have the same parameters, and want gradients of the same ones."""
    own, others = node.step.cells[node.k].parameters, other.step.cells[other.k].parameters
    count = len(own)
    return (
        0 < count == len(others)
        and all(map(is_, own, others))
        and node.needs_input_grad[-count:] == other.needs_input_grad[-count:]
    )


class _StepEnd(torch.autograd.Function):
    """The end of a step: keeps its anchor and its results, and replays its mixes when the backward pass comes to it."""

    @staticmethod
    def forward(ctx: Any, step: Step, nodes: Sequence[Any], saved: Tensors, *tensors: Tensor) -> Tensors:
        ctx.step, ctx.nodes = step, nodes
        ctx.set_materialize_grads(False)
        outputs = tuple([t.view_as(t) for t in tensors])
        packed = step.keeping.pack(outputs[step.width :]) if step.keeps else ()
        connected = tensors[0].new_empty(0, dtype=torch.float32)  # for `once`: an output that costs nothing to save
        ctx.save_for_backward(*saved, *packed, connected)
        return (*outputs, connected)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        refuse_compiled_autograd()
        if torch.is_grad_enabled():
            return once(_replay, ctx, grads, _saved(ctx, running())[-1:])
        return _replay(ctx, grads)


def _replay(end: Any, grads: Gradients) -> Gradients:
    now, step = running(), end.step
    after = _results(end, now)
    _recall(end, now)
    step.replay(now, _saved(end, now)[: step.width], _before(end, now), after, end.nodes)
    del now.results[step], now.saved[step]
    previous = step.begin.end
    if previous is not None and is_going_to_run(previous):
        earlier = previous.step.begin.end
        if earlier is not None and earlier.step.keeping.prefetches:
            _unpacked(earlier, now)
    return (None,) * 3 + tuple(grads[:-1])


def _saved(end: Any, now: BackwardPass) -> Tensors:
    """What `end` has saved: its anchor, the states and the memory that are its own, buffers, its packed results, `connected`.

    Taken once in a pass, as `torch.utils.checkpoint` demands.
    """
    if end.step not in now.saved:
        now.saved[end.step] = end.saved_tensors
    return now.saved[end.step]


def _before(end: Any, now: BackwardPass) -> list[Tensor]:
    """The states and the memory before the step that `end` ends."""
    begin: Begin = end.step.begin
    own = iter(_saved(end, now)[end.step.width :])
    if begin.end is None:
        return [next(own) for _ in begin.places]
    results = _results(begin.end, now)
    return [next(own) if place is None else results[place] for place in begin.places]


def _results(end: Any, now: BackwardPass) -> Tensors:
    """The states and memories after the step that `end` ends; computed again where they were not kept."""
    missing = []
    node = end
    while node is not None and not node.step.keeps and node.step not in now.results:
        missing.append(node)
        node = node.step.begin.end
    for node in reversed(missing):
        _recall(node, now)
        again = node.step.again(_saved(node, now)[: node.step.width], _before(node, now))
        now.results[node.step] = Unpacked(again)
    return _unpacked(end, now).tensors()


def _recall(end: Any, now: BackwardPass) -> None:
    """Bring back the buffers that the step's first evaluations have changed, and what the guard kept of them."""
    own, moved, leaving = end.step.like_saved
    begin = end.step.width + own
    saved = _saved(end, now)
    end.step.recall(saved[begin : begin + moved])
    end.step.watch.recall(saved[begin + moved : begin + moved + leaving])


def _unpacked(end: Any, now: BackwardPass) -> Unpacked:
    """Laid aside until this backward pass comes to `end` itself."""
    step = end.step
    if step not in now.results:
        packed = _saved(end, now)[-1 - len(step.like) : -1]
        now.results[step] = step.keeping.unpack(packed, step.like)
    return now.results[step]
