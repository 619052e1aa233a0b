"""What a running backward pass lays aside for the nodes that it is still to come to."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from revflow._base.torch_private import at_the_end, backward_pass
from revflow._guard.policy import Guard
from revflow._guard.recurrences import Found, judge
from revflow._through_time.states import Unpacked


class BackwardPass:
    """One backward pass. It lives until the pass is through, or has failed: nothing is left behind then."""

    def __init__(self) -> None:
        self.given: dict[tuple[object, int], tuple[Any, tuple[Tensor, ...]]] = {}
        """By step and cell: what the cell was given, and the state and memory that it returned."""
        self.saved: dict[object, tuple[Tensor, ...]] = {}
        """What the end of a step has saved."""
        self.results: dict[object, Unpacked] = {}
        """The states and memories after a step."""
        self.sums: dict[tuple[object, int], list[Tensor | None]] = {}
        """By step and cell: the gradients of its parameters from later steps."""
        self.done: set[tuple[object, int]] = set()
        """The cells that were evaluated."""
        self.found: dict[Guard, list[Found]] = {}
        """What each guard is to compare at the end."""

    def end(self) -> None:
        for guard, found in self.found.items():
            judge(guard, found)


_passes: weakref.WeakValueDictionary[int, BackwardPass] = weakref.WeakValueDictionary()


def running() -> BackwardPass:
    """The backward pass that is now running."""
    task = backward_pass()
    now = _passes.get(task)
    if now is None:
        now = _passes[task] = BackwardPass()
        at_the_end(now.end)  # which holds it until then; nothing else does
    return now
