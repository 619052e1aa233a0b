"""The two arithmetics of streams, one of which a call uses throughout: floating point, and sums on a grid."""

from __future__ import annotations

import operator
from collections.abc import Callable

from torch import Tensor

from revflow._base.streams import Streams
from revflow.exact import Extent, Grid, Residual

Translation = tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[..., Tensor]]
"""A map (stream, shift) -> stream, its inverse, and its inverse in place."""


class Floating:
    """Streams are floating-point numbers: sums are rounded, and inverting them loses the last digits."""

    is_exact = False
    addition: Translation = operator.add, operator.sub, Tensor.sub_
    subtraction: Translation = operator.sub, operator.add, Tensor.add_
    extent: Extent | None = None
    """Checks that streams stay within a grid's range."""
    residuals: list[Residual] | None = None
    """Of a call under standard autograd: a forward pass appends them, an inverse pass removes them from the end."""

    def round(self, x: Tensor) -> Tensor:
        """The result of a map that does more than add, in this arithmetic."""
        return x

    def residual(self, x: Tensor, estimate: Tensor) -> Streams:
        """The tensors that `restored` needs to make x of the estimate."""
        return ()

    def restored(self, estimate: Tensor, residual: Streams) -> Tensor:
        return estimate


class OnGrid(Floating):
    """Streams are multiples of the grid's unit, and sums are exact.

    The results of other maps are rounded. A residual stores the difference that is lost.
    """

    is_exact = True

    def __init__(self, grid: Grid, extent: Extent | None, residuals: list[Residual] | None) -> None:
        self.extent, self.residuals, self._grid = extent, residuals, grid
        self.addition = grid.add, grid.take_back, grid.take_back_
        self.subtraction = grid.take_back, grid.add, grid.add_

    def entered(self, streams: Streams) -> Streams:
        """The input streams of a call, rounded to the grid."""
        for stream in streams:
            if not stream.is_floating_point():
                raise TypeError(f"exact arithmetic takes streams of floating-point numbers, not of {stream.dtype}")
            if self.extent is not None:
                self.extent.see(stream)
        return tuple(map(self._grid.round, streams))

    def round(self, x: Tensor) -> Tensor:
        return self._grid.round(x)

    def residual(self, x: Tensor, estimate: Tensor) -> Streams:
        return self._grid.residual(x, estimate)

    def restored(self, estimate: Tensor, residual: Streams) -> Tensor:
        return self._grid.restore(estimate, Residual(*residual))


FLOATING = Floating()
