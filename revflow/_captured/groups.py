"""Groups of consecutive blocks, each of which is one function of the compiled graph, forward and backward."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from revflow._base.stepwise import Stepwise
from revflow._captured.call import Call
from revflow._captured.structure import length_of_groups, structure_of
from revflow._captured.tensors import Holder, holders_of
from revflow._rewind.laws import Law


@dataclass(frozen=True)
class Step:
    """A block in a group."""

    block: Any
    law: Law | None
    """The coupling's law; None for a block that is not a coupling."""
    conditioners: list[tuple[int, nn.Module]]
    """(target, conditioner), in the order in which they run; none of a block that is not a coupling."""
    holders: list[Holder]
    places: tuple[int, ...]
    """By holder: the place of its tensor among those of the call, or of the group."""
    moving: tuple[int, ...]
    """The places of the buffers that it changes."""

    @property
    def stores(self) -> int:
        """The number of streams that the forward pass stores."""
        return len(self.conditioners) if self.law is not None and self.law.stores_target else 0


@dataclass(frozen=True)
class Group:
    """Consecutive blocks."""

    steps: list[Step]
    widths: tuple[int, int]
    """The numbers of streams before and after it."""
    tensors: list[int]
    """The places of its tensors among those of the call."""
    moving: list[int]
    """The places of the buffers that it changes, among its tensors."""
    kind: Hashable
    """Equal for two groups of which one function can compute both."""

    @property
    def fixed(self) -> list[int]:
        """Its other tensors, by the same places."""
        return [k for k in range(len(self.tensors)) if k not in self.moving]

    @property
    def stores(self) -> int:
        return sum([step.stores for step in self.steps])


def groups_of(call: Call) -> list[Group]:
    kinds = [structure_of(block) for _, block in call.blocks]
    steps = [_step(call, k, block) for k, (_, block) in enumerate(call.blocks)]
    length = length_of_groups(kinds)
    begins = range(0, len(steps), length)
    return [_group(call, begin, steps[begin : begin + length], kinds[begin : begin + length]) for begin in begins]


def _step(call: Call, k: int, block: nn.Module) -> Step:
    law = Law(block, call.passage) if isinstance(block, Stepwise) else None
    streams = (torch.empty(0),) * call.widths[k]
    conditioners = [] if law is None else law.block.conditioners(streams)[:: call.passage.direction.sign]
    return Step(block, law, conditioners, holders_of(block), call.places[k], call.moving[k])


def _group(call: Call, begin: int, steps: list[Step], kinds: list[Hashable]) -> Group:
    tensors = [*dict.fromkeys([place for step in steps for place in step.places])]
    own = {place: number for number, place in enumerate(tensors)}
    steps = [
        replace(step, places=tuple([own[p] for p in step.places]), moving=tuple([own[p] for p in step.moving]))
        for step in steps
    ]
    kind = tuple([(kind, step.places, step.moving) for kind, step in zip(kinds, steps, strict=True)])
    widths = call.widths[begin], call.widths[begin + len(steps)]
    return Group(steps, widths, tensors, [place for step in steps for place in step.moving], kind)
