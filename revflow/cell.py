"""A recurrent cell, and what a step of a recurrence leaves for the next one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from torch import nn

from revflow._base.streams import Streams, Tensors


class RecurrentState(NamedTuple):
    """What a step leaves for the next one.

    Examples:
        >>> h = torch.zeros(2, 4)
        >>> state = revflow.RecurrentState(cells=((h,), (h,)), memories=((), ()))  # of two cells without memories
        >>> len(state.cells)
        2
    """

    cells: tuple[Tensors, ...]
    """The state of every cell."""
    memories: tuple[Tensors, ...]
    """The memory that left every cell; the last one enters the first cell in the next step."""


class RecurrentCell(nn.Module, ABC):
    """A module of a `ReversibleRecurrence`: streams go in and out, and a state goes from step to step.

    All its cost should be in `update`: it runs twice a training step, `mix` three times. A memory is whatever passes from
    each cell to the next one, and from the last one to the first of the next step; it may be empty.

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
        """The new state and the new memory, tensor by tensor of the shapes of the old ones."""

    @abstractmethod
    def mix(self, streams: Streams, state: Tensors, context: dict[str, Any]) -> Streams:
        """The output streams, from the input streams and the new state."""

    def forward(
        self, streams: Streams, state: Tensors, memory: Tensors = (), **context: Any
    ) -> tuple[Streams, Tensors, Tensors]:
        """One step of this cell alone, under ordinary autograd: streams, state and memory."""
        state, memory = self.update(streams, state, memory, context)
        return self.mix(streams, state, context), state, memory
