"""A check, while PyTorch traces a call of a sequence, of whether the call can be captured.

The two evaluations of a conditioner in a graph agree only if it draws no random numbers and changes no state. So the conditioners
are evaluated once on fake tensors, which have no data. Every operation is seen then, also those that no module reveals, such as
`torch.nn.functional.dropout`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

from revflow._base.stepwise import Stepwise
from revflow._base.streams import Context, Streams, rotate
from revflow._base.user_warnings import warn
from revflow._captured.call import Call, Path, located, register
from revflow._captured.given import Given, constants_of, filled_without_data, kind_of, made, make_static, objection_to
from revflow._captured.stored_blocks import is_planned, number_recomputed
from revflow._captured.watch import ObjectionError, evaluated_without_data, objections_to, refuse_hooks, watched
from revflow._replay.autocast import autocast_state
from revflow._rewind.block_list import BlockList, flattened
from revflow._rewind.direction import FORWARD, INVERSE
from revflow._rewind.laws import Law
from revflow._rewind.passage import Passage
from revflow._rewind.plain import call_whole
from revflow.budget import Budget

OUTSIDE = "a ReversibleSequence runs outside of this compiled graph: {}"


class Survey(NamedTuple):
    """The result of the check."""

    objection: str = ""
    """The reason why the call cannot be captured; empty if it can."""
    number: int = -1
    """Of the call, for `call.registered`."""
    paths: tuple[Path, ...] = ()
    """The tensors of all blocks, each once."""
    moving: tuple[tuple[str, ...], ...] = ()
    """By block, in the order in which they run: the names of the buffers that an evaluation changes."""
    moved: tuple[int, ...] = ()
    """The places of these buffers among the tensors."""
    recomputed: int = 0
    """The number of blocks whose activations are recomputed: the first ones."""


def survey(sequence: BlockList, passage: Passage, join: int | None, streams: Streams, context: Context) -> Survey:
    """Find out whether a call of the sequence can be captured."""
    if is_planned(sequence, passage):
        make_static([*streams, *[value for value in context.values() if isinstance(value, Tensor)]])
    tensors, others = constants_of(context)
    objection = objection_to(others)
    options = objection, passage.direction.name, passage.log_det, join
    return Survey(*_surveyed(sequence, options, tuple(map(kind_of, streams)), tensors, () if objection else others))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _surveyed(
    sequence: BlockList,
    options: tuple[str, str, bool, int | None],
    streams: tuple[tuple[Any, ...], ...],
    tensors: tuple[tuple[Any, ...], ...],
    others: tuple[tuple[str, Any], ...],
) -> tuple[Any, ...]:
    """The fields of a `Survey`.

    PyTorch calls this function while it traces the call, and takes the result as a constant. So the arguments are constants too.
    `options` are a reason why the call cannot be captured, if there is one, the name of the direction, whether the
    log-determinant is computed, and the dimension along which streams are joined. `streams` has the fields of a `Given` for each
    stream. `tensors` has the same, after the name, for each tensor among the keyword arguments. `others` has the other ones.
    """
    objection, direction, log_det, join = options
    passage = Passage(FORWARD if direction == FORWARD.name else INVERSE, log_det=log_det)
    context = {name: Given(*given) for name, *given in tensors} | dict(others)
    try:
        if objection:
            raise ObjectionError(objection)
        _refuse_options(sequence)
        recomputed = number_recomputed(sequence, passage, join, [Given(*s) for s in streams], context)
        blocks = [*flattened(sequence)][:: passage.direction.sign]
        moving, widths = _survey_of_blocks(
            sequence, passage, blocks[:recomputed], [Given(*s) for s in streams], context
        )
    except ObjectionError as found:
        warn(OUTSIDE.format(found), UserWarning)
        return (str(found),)
    state, names = tuple(autocast_state(streams[0][2])), tuple([name for name, *_ in tensors])
    join = join if recomputed == len(blocks) else None
    call = Call(ref(sequence), passage, join, names, dict(others), state, recomputed, tuple(widths))
    paths, numbers, places = located(call.blocks)
    moved = [
        tuple([numbers[id(block.get_buffer(name))] for name in names])
        for (_, block), names in zip(call.blocks, moving, strict=True)
    ]
    call = call._replace(places=places, moving=tuple(moved))
    return "", register(call, sequence), tuple(paths), tuple(moving), call.moved, recomputed


def _refuse_options(sequence: Any) -> None:
    if sequence.exact:
        raise ObjectionError(
            "in exact arithmetic, both evaluations must agree in every bit, but a compiler may fuse them differently"
        )
    if sequence.chunks > 1:
        raise ObjectionError("only the engine evaluates conditioners in chunks")
    budget = sequence.memory_budget
    if isinstance(budget, Budget) and budget.memory != "min":
        raise ObjectionError(f"only the engine plans a budget that several modules share ({budget!r})")


def _survey_of_blocks(
    sequence: BlockList,
    passage: Passage,
    blocks: Sequence[tuple[str, nn.Module]],
    streams: Sequence[Given],
    context: dict[str, Any],
) -> tuple[list[tuple[str, ...]], list[int]]:
    """By block: the names of buffers that it changes, and the number of streams before it, with that after the last one."""
    if not all([given.dtype.is_floating_point for given in streams]):
        raise ObjectionError("a stream does not consist of floating-point numbers")
    moving: list[tuple[str, ...]] = []
    widths = [len(streams)]
    with evaluated_without_data(sequence, streams[0].device):
        now: Streams = tuple(map(made, streams))
        filled = filled_without_data(context)
        for name, block in blocks:
            with objections_to(f"block {name}", block):
                refuse_hooks(block)
                outputs, its = _through(passage, block, now, filled)
            now = tuple([s.detach().requires_grad_() for s in outputs])
            moving.append(its)
            widths.append(len(now))
    statistics = [block.get_buffer(n) for (_, block), names in zip(blocks, moving, strict=True) for n in names]
    if len({*map(id, statistics)}) < len(statistics):
        raise ObjectionError("two conditioners share a BatchNorm, whose statistics they both move")
    return moving, widths


def _through(passage: Passage, block: nn.Module, streams: Streams, context: Context) -> tuple[Streams, tuple[str, ...]]:
    """The block's output, and the names of statistics that move. ObjectionError if the code does more than that."""
    arguments = [value for value in context.values() if isinstance(value, Tensor)]
    if not isinstance(block, Stepwise):
        evaluate = partial(call_whole, block, passage.direction, passage.log_det, streams, context)
        moving, outputs = watched(block, block, evaluate, (*streams, *arguments))
        return outputs[: len(outputs) - passage.log_det], moving
    law, moving = Law(block, passage), ()
    now = rotate([*streams], law.rotations[0])
    for k, conditioner in block.conditioners(streams)[:: passage.direction.sign]:
        x, others = now[k], now[:k] + now[k + 1 :]
        evaluate = partial(block.evaluate, conditioner, x, others, context)
        its, t = watched(block, conditioner, evaluate, (*others, *arguments))
        moving += its
        now[k] = law.apply(x, *t).detach()
    return tuple(rotate(now, law.rotations[1])), moving
