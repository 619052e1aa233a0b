"""A recurrent cell, and the state that a recurrence passes from one time step to the next."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from torch import nn

from revflow._base.streams import Streams, Tensors


class RecurrentState(NamedTuple):
    """The state passed from one time step to the next, a named tuple.

    Examples:
        >>> h = torch.zeros(2, 4)
        >>> state = revflow.RecurrentState(cells=((h,), (h,)), memories=((), ()))  # of two cells without memories
        >>> len(state.cells)
        2
    """

    cells: tuple[Tensors, ...]
    """The state of each cell, as a tuple of tensors. These tensors may have any shape."""
    memories: tuple[Tensors, ...]
    """The memory returned by each cell. In the next time step, the last memory is passed to the first cell."""


class RecurrentCell(nn.Module, ABC):
    """The base class for the cells of a `ReversibleRecurrence`. A cell computes output streams and a new state.

    Each cell passes its memory, a tuple of tensors, to the next cell. The last cell passes its memory to the first cell in the
    next time step. The tuple may be empty. Put all expensive operations in `update`: during training, `update` is evaluated only
    twice per time step, whereas `mix` is evaluated three times.

    Examples:
        >>> class Cell(revflow.RecurrentCell):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.new = torch.nn.Linear(8, 4)
        ...
        ...     def update(self, streams, state, memory, context):
        ...         return (torch.tanh(self.new(torch.cat((streams[0], state[0]), -1))),), memory
        ...
        ...     def mix(self, streams, state, context):
        ...         return streams[1] + state[0], streams[0]
        >>> net = revflow.ReversibleRecurrence([Cell()])
        >>> x = torch.randn(2, 4)
        >>> outputs, last = net([(x, x)] * 3, revflow.RecurrentState(cells=((x,),), memories=((),)))
        >>> len(outputs)
        3
    """

    @abstractmethod
    def update(
        self, streams: Streams, state: Tensors, memory: Tensors, context: dict[str, Any]
    ) -> tuple[Tensors, Tensors]:
        """Return the new state and the new memory. Each tensor must have the same shape as the tensor that it replaces."""

    @abstractmethod
    def mix(self, streams: Streams, state: Tensors, context: dict[str, Any]) -> Streams:
        """Return the output streams, computed from the input streams and the new state."""

    def forward(
        self, streams: Streams, state: Tensors, memory: Tensors = (), **context: Any
    ) -> tuple[Streams, Tensors, Tensors]:
        """Run one time step of only this cell under standard autograd.

        Return the output streams, the new state and the new memory.
        """
        state, memory = self.update(streams, state, memory, context)
        return self.mix(streams, state, context), state, memory
