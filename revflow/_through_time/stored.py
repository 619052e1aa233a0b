"""A time step whose activations standard autograd stores."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

from torch import Tensor

from revflow._base.streams import Gradients, Tensors
from revflow._rewind.functions import Hold
from revflow._through_time.functions import Results
from revflow._through_time.passes import running
from revflow._through_time.states import Storage
from revflow._through_time.steps import StepInput
from revflow.cell import RecurrentCell


def run_stored(
    cells: Sequence[RecurrentCell], given: StepInput, storage: Storage, lifetime: Tensor | None = None
) -> Results:
    """The output streams, and the new state and memory of every cell. The graph holds `lifetime`, if that is given.

    The streams then have a node of their own: if they are not used, the graph of the last `mix` is freed with them.
    """
    streams, states, memory, context = given
    results = []
    for cell, state in zip(cells, states, strict=True):
        new, left = cell.update(streams, state, memory, context)
        new, memory = (tuple(map(storage.rounded, tensors)) for tensors in (new, left))
        streams = cell.mix(streams, new, context)
        results.append((new, memory))
    if lifetime is None:
        return streams, results
    ended = iter(_end(lifetime, tuple(chain(*chain(*results)))))
    return _end(lifetime, streams), [
        (tuple([next(ended) for _ in new]), tuple([next(ended) for _ in left])) for new, left in results
    ]


def _end(lifetime: Tensor, outputs: Tensors) -> Tensors:
    """The outputs of a stored step, with a graph that holds `lifetime` until it is freed."""
    return _StoredEnd.apply(lifetime, *outputs) if outputs else outputs  # type: ignore[no-untyped-call]


class _StoredEnd(Hold):
    """Also announces a stored step in the backward pass."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        running().has_stored_steps = True
        return (None, *grads)
