"""The data that a running backward pass holds for the autograd nodes that it has not reached yet."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from revflow._base.torch_private import at_the_end, backward_pass
from revflow._guard.policy import Guard
from revflow._guard.recurrences import Found, judge
from revflow._through_time.states import Unpacked


class BackwardPass:
    """One backward pass. It is freed when the pass has ended or failed, and nothing outlives it."""

    def __init__(self) -> None:
        self.given: dict[tuple[object, int], tuple[Any, tuple[Tensor, ...]]] = {}
        """By time step and cell: the cell's input, and the state and memory that it returned."""
        self.saved: dict[object, tuple[Tensor, ...]] = {}
        """By time step: the tensors that its end has saved."""
        self.results: dict[object, Unpacked] = {}
        """By time step: the states and memories after it."""
        self.sums: dict[tuple[object, int], list[Tensor | None]] = {}
        """By time step and cell: the gradients of the cell's parameters from later steps."""
        self.has_stored_steps = False
        """Whether standard autograd stores some steps that this pass has reached."""
        self.done: set[tuple[object, int]] = set()
        """The cells that were evaluated, each with its time step."""
        self.found: dict[Guard, list[Found]] = {}
        """The values that each guard compares at the end."""

    def end(self) -> None:
        for guard, found in self.found.items():
            judge(guard, found)


_passes: weakref.WeakValueDictionary[int, BackwardPass] = weakref.WeakValueDictionary()


def running() -> BackwardPass:
    """The backward pass that is running in this thread."""
    task = backward_pass()
    now = _passes.get(task)
    if now is None:
        now = _passes[task] = BackwardPass()
        at_the_end(now.end)  # only this callback holds the object, and autograd drops it when the pass ends
    return now
