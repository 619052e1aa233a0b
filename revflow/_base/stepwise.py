"""The interface of a coupling, as the engine uses it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import Tensor, nn

from revflow._base.streams import Context, Streams


class Stepwise(ABC):
    """A block that the engine runs conditioner by conditioner, so that each runs exactly twice per training step.

    Forward: for each conditioner, `combine(target, *t)` overwrites its target stream. `combine` is an elementwise map whose
    coefficients t the conditioner computes from the other streams. Then the streams are rotated to the left by `rotation`.
    Inverse: the streams are rotated back. Then `separate(target, *t)` overwrites the targets, in reverse order.
    """

    rotation: int
    combine: Callable[..., Tensor]
    separate: Callable[..., Tensor]
    log_derivative: Callable[..., Tensor]
    """(target, *t) -> log |d combine / d target|, elementwise."""
    ill_conditioned: ClassVar[bool]
    """Whether `separate` loses digits. If so, the overwritten stream is stored as an anchor instead of being recomputed."""

    @property
    @abstractmethod
    def translates(self) -> bool:
        """Whether `combine` adds its only coefficient and `separate` subtracts it: their gradients then need no graph."""

    @property
    @abstractmethod
    def unobserved(self) -> bool:
        """Whether a call of the block would run no code but the engine's: it has no hooks and no `forward` of a subclass."""

    @abstractmethod
    def conditioners(self, streams: Streams) -> list[tuple[int, nn.Module]]:
        """(target, conditioner), in the order of the forward pass; ValueError if the block cannot take these streams."""

    @abstractmethod
    def evaluate(self, conditioner: nn.Module, target: Tensor, others: Sequence[Tensor], context: Context) -> Streams:
        """The coefficients t for a stream of `target`'s shape and dtype."""
