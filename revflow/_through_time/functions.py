"""The autograd Functions of a recurrence: the tensors that each time step stores, and the recomputation of the others.

A time step stores its input streams (the anchor), and its results in the way of `states`. Its backward pass first replays the
mixes from the anchor, which gives the input of every cell. Then each cell, from the last to the first, is evaluated again, with
a graph. So an update runs exactly twice per training step, and a mix three times. If the results of a step are not stored, they
are recomputed from the last stored ones: updates and mixes then run once more.

There is one Function per cell, so that the gradients of a cell reach the one before it as soon as they are there. Another
Function, `_StepEnd`, ends the step. Every path to a cell leads through it, and it replays the mixes. In most cases, the states
that a step begins with are results of the step before. They are found by their `grad_fn`, which is the end of that step, and
are not saved twice. The data of a running backward pass is in its `passes.BackwardPass`, which is freed with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor

from revflow._base.errors import BLOCK_ERRORS, with_place
from revflow._base.second_derivative import once
from revflow._base.streams import Gradients, Streams, Tensors
from revflow._base.torch_private import is_going_to_run, node_type
from revflow._replay.refusals import refuse_compiled_autograd
from revflow._rewind.graph import alias_of, leaf, not_leaves
from revflow._through_time.passes import BackwardPass, running
from revflow._through_time.states import Unpacked
from revflow._through_time.steps import Origin, StepInput, TimeStep

Results = tuple[Streams, list[tuple[Tensors, Tensors]]]
"""The output streams of a time step, and the new state and memory of every cell."""


def run(step: TimeStep, given: StepInput, lifetime: Tensor | None = None) -> Results:
    """Run a time step that is recomputed in the backward pass. The graph holds `lifetime`."""
    streams, states, memory, _ = given
    before = given.before
    anchor = tuple([s.detach() for s in streams])
    own = [t.detach() for t, place in zip(before, step.origin.places, strict=True) if place is None]
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
        streams, state, memory = step.split(outputs, k)
        results += [*state, *memory]
    step.draws.end()
    if any(nodes):
        step.like = [(t.dtype, t.device) for t in results]
        leaving = step.watch.see(tuple([s.detach() for s in streams]))
        moved = step.moved()
        saved = (*anchor, *own, *moved, *leaving, *([] if lifetime is None else [lifetime]))
        step.like_saved = len(own), len(moved), len(leaving)
        ended: Tensors = _StepEnd.apply(step, nodes, saved, *streams, *results)  # type: ignore[no-untyped-call]
        streams, results = ended[: len(streams)], [*ended[len(streams) : -1]]
    return streams, step.by_cell(results)


def origin_of(tensors: Sequence[Tensor]) -> Origin:
    """The step before, if one of the tensors is its result, and their places among its results."""
    ends = [_end_of(t) for t in tensors]
    end = next(filter(None, ends), None)
    return Origin(
        end,
        [t.output_nr - end.step.width if end and its is end else None for t, its in zip(tensors, ends, strict=True)],
    )


def _end_of(tensor: Tensor) -> Any:
    """The `_StepEnd` of which the tensor is a result; None for any other tensor, including a stream that left a step."""
    node: Any = tensor.grad_fn
    is_end = isinstance(node, node_type(_StepEnd))
    return node if is_end and tensor.output_nr >= node.step.width else None


class _Update(torch.autograd.Function):
    """The evaluation of a cell in one time step."""

    @staticmethod
    def forward(ctx: Any, step: TimeStep, k: int, *tensors: Tensor) -> Tensors:
        cell, given = step.cells[k], step.split(tensors, k)
        inputs = [*chain(*given)]
        context = step.arguments.filled(tensors[len(inputs) : len(tensors) - len(cell.parameters)])
        ctx.step, ctx.k, ctx.layout = step, k, [t.stride() for t in inputs]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[len(inputs) :])
        first = partial(cell.first, step, given, context)
        with step.watch.remember(f"cell {k}", cell.update):
            return tuple(chain(*(first() if step.meter is None else step.meter.first(first, given, cell.module))))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        if torch.is_grad_enabled():
            return once(_cell_gradients, ctx, grads, [g for g in grads if g is not None])
        return _cell_gradients(ctx, grads)


def _cell_gradients(ctx: Any, grads: Gradients) -> Gradients:
    """The gradients of all inputs of the cell, including its parameters."""
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
        returned = cell.again(own, step, step.split(entering, k), context)
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
    if earlier_step is not None and (earlier_step, k) in now.sums:  # from another step that began with the same states
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
    """Leave each leaf's gradient in its `grad`; those of the last leaves, the parameters, are added to `sums`.

    Autograd adds each parameter's gradient to its sum as soon as it is computed. So the gradients of a whole cell never exist
    alongside the sums.
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


def _earlier_step(ctx: Any, now: BackwardPass) -> TimeStep | None:
    """The nearest earlier step whose evaluation of the same cell this backward pass will still reach; None if there is none.

    That evaluation adds this step's gradients of the parameters to its own.
    """
    k, end = ctx.k, ctx.step.origin.end
    if now.has_stored_steps:
        # Autograd already adds up the parameters' gradients of the stored steps. A second sum would take as much again.
        return None
    while end is not None:
        node = end.nodes[k] if k < len(end.nodes) else None
        if (
            node is not None
            and _has_parameters_of(node, ctx)
            and (end.step, k) not in now.done
            and is_going_to_run(node)
        ):
            return end.step  # type: ignore[no-any-return]
        end = end.step.origin.end
    return None


def _has_parameters_of(node: Any, other: Any) -> bool:
    """Whether two evaluations of a cell have the same parameters, of which the same ones require gradients."""
    own, others = node.step.cells[node.k].parameters, other.step.cells[other.k].parameters
    count = len(own)
    return (
        0 < count == len(others)
        and all(map(is_, own, others))
        and node.needs_input_grad[-count:] == other.needs_input_grad[-count:]
    )


class _StepEnd(torch.autograd.Function):
    """The end of a time step: saves its anchor and its results, and replays its mixes when the backward pass reaches it."""

    @staticmethod
    def forward(ctx: Any, step: TimeStep, nodes: Sequence[Any], saved: Tensors, *tensors: Tensor) -> Tensors:
        ctx.step, ctx.nodes = step, nodes
        ctx.set_materialize_grads(False)
        outputs = tuple([t.view_as(t) for t in tensors])
        packed = step.storage.pack(outputs[step.width :]) if step.is_stored else ()
        connected = tensors[0].new_empty(0, dtype=torch.float32)  # for `once`: an output that costs nothing to save
        ctx.save_for_backward(*saved, *packed, connected)
        return (*outputs, connected)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        refuse_compiled_autograd()
        if torch.is_grad_enabled():
            return once(_replay_mixes, ctx, grads, _saved(ctx, running())[-1:])
        return _replay_mixes(ctx, grads)


def _replay_mixes(end: Any, grads: Gradients) -> Gradients:
    now, step = running(), end.step
    after = _results(end, now)
    _recall(end, now)
    step.replay(now, _saved(end, now)[: step.width], _before(end, now), after, end.nodes)
    del now.results[step], now.saved[step]
    previous = step.origin.end
    if previous is not None and is_going_to_run(previous):
        earlier = previous.step.origin.end
        if earlier is not None and earlier.step.storage.prefetches:
            _unpacked(earlier, now)
    return (None,) * 3 + tuple(grads[:-1])


def _saved(end: Any, now: BackwardPass) -> Tensors:
    """The saved tensors of `end`: anchor, own states and memory, buffers, values for the guard, packed results, `connected`.

    They are read once per pass, as `torch.utils.checkpoint` requires.
    """
    if end.step not in now.saved:
        now.saved[end.step] = end.saved_tensors
    return now.saved[end.step]


def _before(end: Any, now: BackwardPass) -> list[Tensor]:
    """The states and the memory before the step that `end` ends."""
    before, places = end.step.origin
    own = iter(_saved(end, now)[end.step.width :])
    if before is None:
        return [next(own) for _ in places]
    results = _results(before, now)
    return [next(own) if place is None else results[place] for place in places]


def _results(end: Any, now: BackwardPass) -> Tensors:
    """The states and memories after the step that `end` ends, recomputed if they were not stored."""
    missing = []
    node = end
    while node is not None and not node.step.is_stored and node.step not in now.results:
        missing.append(node)
        node = node.step.origin.end
    for node in reversed(missing):
        _recall(node, now)
        again = node.step.again(_saved(node, now)[: node.step.width], _before(node, now))
        now.results[node.step] = Unpacked(again)
    return _unpacked(end, now).tensors()


def _recall(end: Any, now: BackwardPass) -> None:
    """Restore the buffers that the step's first evaluations changed, and the values that the guard stored."""
    own, moved, leaving = end.step.like_saved
    begin = end.step.width + own
    saved = _saved(end, now)
    end.step.recall(saved[begin : begin + moved])
    end.step.watch.recall(saved[begin + moved : begin + moved + leaving])


def _unpacked(end: Any, now: BackwardPass) -> Unpacked:
    """The results of the step that `end` ends, which `now` holds until this backward pass reaches `end`."""
    step = end.step
    if step not in now.results:
        packed = _saved(end, now)[-1 - len(step.like) : -1]
        now.results[step] = step.storage.unpack(packed, step.like)
    return now.results[step]
