"""A recurrent cell, and the state that a recurrence passes from one time step to the next."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from torch import nn

from revflow._base.streams import Streams, Tensors


class RecurrentState(NamedTuple):
    """The state that a time step passes to the next one.

    Examples:
        >>> h = torch.zeros(2, 4)
        >>> state = revflow.RecurrentState(cells=((h,), (h,)), memories=((), ()))  # of two cells without memories
        >>> len(state.cells)
        2
    """

    cells: tuple[Tensors, ...]
    """State of each cell, as a tuple of tensors of any shapes."""
    memories: tuple[Tensors, ...]
    """Memory that each cell returned. The last one enters the first cell in the next time step."""


class RecurrentCell(nn.Module, ABC):
    """The base class for cells of a `ReversibleRecurrence`, which map streams to streams and a state to its next value.

    A memory is a tuple of tensors that each cell passes to the next one, and the last cell to the first one of the next time
    step. It may be empty. Put all costly operations into `update`: in training, each time step evaluates it twice, and `mix`
    three times.

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
        """The new state and the new memory, each tensor of the shape of the old one."""

    @abstractmethod
    def mix(self, streams: Streams, state: Tensors, context: dict[str, Any]) -> Streams:
        """The output streams, computed from the input streams and the new state."""

    def forward(
        self, streams: Streams, state: Tensors, memory: Tensors = (), **context: Any
    ) -> tuple[Streams, Tensors, Tensors]:
        """One time step of only this cell, under standard autograd. Returns the streams, the state and the memory."""
        state, memory = self.update(streams, state, memory, context)
        return self.mix(streams, state, context), state, memory
