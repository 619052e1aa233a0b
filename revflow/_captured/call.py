"""The constants of a graph that contains a sequence: the blocks, and the places of tensors in the list of arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from revflow._base.stepwise import Stepwise
from revflow._base.streams import Context, Streams
from revflow._captured.survey import Survey
from revflow._rewind.laws import Law
from revflow._rewind.passage import Passage


class Part(NamedTuple):
    """A conditioner in one call, or a whole block that is not a coupling."""

    block: Any
    law: Any
    """The coupling's law; None for a block that is not a coupling."""
    target: int
    """The stream that the conditioner changes."""
    module: nn.Module
    names: tuple[str, ...]
    """Of its parameters."""
    needs: tuple[bool, ...]
    """Which of them require a gradient."""
    moving: tuple[str, ...]
    """Names of the buffers that an evaluation changes: BatchNorm's statistics."""
    unmoved: tuple[None, ...]
    """Their replacements in a second evaluation, which does not read them."""
    own: tuple[int, ...]
    """The places of its parameters among those of the call. Blocks may share parameters."""
    buffers: slice
    """The places of its moving buffers among those of the call."""


class Step(NamedTuple):
    """A block in one call."""

    rotations: tuple[int, int]
    """By how many places the streams are rotated before its parts, and after them."""
    parts: tuple[Part, ...]


class Call(NamedTuple):
    """One call of a sequence."""

    steps: tuple[Step, ...]
    passage: Passage
    join: int | None
    """The dimension along which the output's streams are joined; None if they are not."""
    width: int
    """The number of streams."""
    names: tuple[str, ...]
    """Of the tensors among the keyword arguments."""
    needs: tuple[bool, ...]
    """Which of these tensors require a gradient."""
    others: Context
    """The keyword arguments that are not tensors."""
    autocast: tuple[str, bool, torch.dtype]
    parameters: int
    buffers: int
    """The numbers of parameters, and of buffers that move."""


class Arguments(NamedTuple):
    """The tensors of a call."""

    leaves: list[Tensor]
    """Those among the keyword arguments."""
    parameters: list[Tensor]
    buffers: list[Tensor]
    """Those that an evaluation changes."""


def prepared(
    blocks: Sequence[nn.Module],
    passage: Passage,
    join: int | None,
    streams: Streams,
    context: Context,
    survey: Survey,
) -> tuple[Call, Arguments]:
    """A call of the blocks, in the order in which they run."""
    leaves = {name: value for name, value in context.items() if isinstance(value, Tensor)}
    others = {name: value for name, value in context.items() if not isinstance(value, Tensor)}
    steps: list[Step] = []
    parameters: list[Tensor] = []
    buffers: list[Tensor] = []
    number = 0
    for block in blocks:
        law = Law(block, passage) if isinstance(block, Stepwise) else None
        modules = [(0, block)] if law is None else law.block.conditioners(streams)[:: passage.direction.sign]
        parts: list[Part] = []
        for target, module in modules:
            own, its_buffers = dict(module.named_parameters()), dict(module.named_buffers())
            its_moving, of_own, number = survey.moving[number], survey.places[number], number + 1
            of_buffers = slice(len(buffers), len(buffers) + len(its_moving))
            needs = tuple([p.requires_grad for p in own.values()])
            unmoved = (None,) * len(its_moving)
            part = Part(block, law, target, module, tuple(own), needs, its_moving, unmoved, of_own, of_buffers)
            parts.append(part)
            for parameter, place in zip(own.values(), of_own, strict=True):
                if place == len(parameters):
                    parameters.append(parameter)
            buffers += [its_buffers[name] for name in its_moving]
        steps.append(Step((0, 0) if law is None else law.rotations, tuple(parts)))
    kind = streams[0].device.type
    autocast = kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    needs = tuple([t.requires_grad for t in leaves.values()])
    call = Call(
        tuple(steps), passage, join, len(streams), tuple(leaves), needs, others, autocast, len(parameters), len(buffers)
    )
    return call, Arguments([*leaves.values()], parameters, buffers)


def split(call: Call, tensors: Sequence[Any]) -> tuple[Any, Any, Any, Any]:
    """The streams, the tensors among the keyword arguments, the parameters and the buffers."""
    first, second = call.width, call.width + len(call.needs)
    third = second + call.parameters
    return tensors[:first], tensors[first:second], tensors[second:third], tensors[third:]
