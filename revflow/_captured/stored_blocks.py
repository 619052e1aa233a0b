"""The blocks whose activations a compiled graph stores, because they fit in the memory budget."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch

from revflow._base.torch_private import fake_tensor
from revflow._captured.given import Given, filled_without_data, made
from revflow._captured.tensors import holders_of, holding
from revflow._captured.watch import objections_to
from revflow._rewind.block_list import flattened
from revflow._rewind.passage import Passage
from revflow.budget import Budget


def is_planned(sequence: Any, passage: Passage) -> bool:
    """Whether the number of stored blocks depends on the sizes of the arguments. An inverse, which has no plan, stores none."""
    budget = sequence.memory_budget
    return budget != "min" and not isinstance(budget, Budget) and passage.direction.sign > 0


def number_recomputed(
    sequence: Any, passage: Passage, join: int | None, streams: Sequence[Given], context: dict[str, Any]
) -> int:
    """The number of blocks at the beginning of a call whose activations are recomputed. Those of the others are stored.

    It is the choice of `sequence.plan` for tensors without data.
    """
    blocks = [block for _, block in flattened(sequence)]
    if not is_planned(sequence, passage):
        return len(blocks)
    with objections_to("its plan", sequence), ExitStack() as stack:
        fake_mode = stack.enter_context(fake_tensor.FakeTensorMode())
        memo: dict[int, Any] = {}
        for block in blocks:
            holders = holders_of(block)
            # Without that, the plan would count parameters as activations.
            tensors = [memo.setdefault(id(h.tensor), _without_data(fake_mode, h.tensor)) for h in holders]
            stack.enter_context(holding(block, holders, tensors))
        given = tuple(map(made, streams))
        planned: Any = sequence[:]  # a copy with measurements of its own
        plan = planned.plan(given if join is None else torch.cat(given, join), **filled_without_data(context))
    return int(plan.first_kept)


def _without_data(fake_mode: Any, tensor: torch.Tensor) -> Any:
    return fake_mode.from_tensor(tensor, static_shapes=True)
