"""The face of a coupling that the engine knows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import Tensor, nn

from revflow._base.streams import Context, Streams


class Stepwise(ABC):
    """A block that the engine takes apart, so that each conditioner runs exactly twice a training step.

    Forward: for each conditioner, its target stream is overwritten by `combine(target, *t)`, an elementwise map whose
    coefficients t the conditioner computes from the other streams; then the streams are rotated to the left by `rotation`.
    Inverse: rotated back, then the targets are overwritten by `separate(target, *t)`, in reverse order.
    """

    rotation: int
    combine: Callable[..., Tensor]
    separate: Callable[..., Tensor]
    log_derivative: Callable[..., Tensor]
    """(target, *t) -> log |d combine / d target|, elementwise."""
    ill_conditioned: ClassVar[bool]
    """Whether `separate` loses digits: the overwritten stream is then kept as an anchor instead of rebuilt."""

    @property
    @abstractmethod
    def translates(self) -> bool:
        """Whether `combine` adds its only coefficient and `separate` subtracts it: their gradients then need no graph."""

    @property
    @abstractmethod
    def unobserved(self) -> bool:
        """Whether nothing but the engine would run if the block were called: no hooks, no `forward` of a subclass."""

    @abstractmethod
    def conditioners(self, streams: Streams) -> list[tuple[int, nn.Module]]:
        """(target, conditioner), in the order in which the forward runs them; ValueError if it cannot take these streams."""

    @abstractmethod
    def evaluate(self, conditioner: nn.Module, target: Tensor, others: Sequence[Tensor], context: Context) -> Streams:
        """The coefficients t for a stream of `target`'s shape and dtype."""
