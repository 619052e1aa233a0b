"""Exact arithmetic in floating point: numbers on a grid, whose sums can be inverted to the last bit.

A float of p significant bits (24 for float32) represents every multiple of 2^-bits up to 2^(p - bits). Sums and differences of
such multiples are not rounded if they stay in that range. Once d is on the grid, x = y - d therefore inverts y = x + d exactly,
in any number of blocks. If a stream is also scaled, rounding loses information. A `Residual` stores it, mostly in one byte per
value.

All functions take floating-point tensors of any shape and return new ones of the same shape and dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from revflow._base.torch_private import FakeTensor, is_forward_ad, unwrapped

_ESCAPE = -128
"""The code of a value that is stored in full."""


class Residual(NamedTuple):
    """The differences between true values and their estimates.

    `Grid.restore` recovers the true values from the estimates and these differences.

    Examples:
        >>> class GateAndValue(torch.nn.Linear):
        ...     def forward(self, x):
        ...         return super().forward(x).chunk(2, -1)
        >>> net = revflow.ReversibleSequence([revflow.GatedCoupling(GateAndValue(4, 8))], exact=True)
        >>> y, residuals = net.forward_with_residuals(torch.randn(2, 8))
        >>> residuals[0].codes.dtype
        torch.int8
    """

    codes: Tensor
    """True value minus estimate, in units of the grid, as an int8 tensor with the shape of the stream.

    The code -128 marks a difference that does not fit in a byte.
    """
    escaped: Tensor
    """The true values at the marked positions, in order, as a one-dimensional tensor with the dtype of the stream."""


@dataclass(frozen=True)
class Grid:
    """A fixed-point grid: the multiples of 2^-bits. With 16 bits, float32 can represent values up to 256 in steps of 1.5e-5.

    More bits result in smaller steps, but also in a smaller range. If a stream exceeds the range, an OverflowError is raised. If
    fewer bits would suffice, the error message states a suitable number.

    Args:
        bits: Number of bits after the binary point, an integer from 1 to 52.

    Raises:
        ValueError: If `bits` is not an integer from 1 to 52.

    Examples:
        >>> grid = revflow.Grid(bits=16)
        >>> grid.limit(torch.float32)
        256.0
        >>> net = revflow.ReversibleSequence([revflow.AdditiveCoupling(torch.nn.Linear(4, 4))], exact=grid)
        >>> x = torch.randn(2, 8)
        >>> torch.equal(net.inverse(net(x)), grid.round(x))
        True
    """

    bits: int = 16

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not 1 <= self.bits <= 52:
            raise ValueError(f"Grid: bits must be a whole number from 1 to 52; got {self.bits!r}")

    @property
    def unit(self) -> float:
        """The distance between two neighboring values on the grid."""
        return 2.0**-self.bits

    def limit(self, dtype: torch.dtype) -> float:
        """Return the absolute value up to which a tensor of `dtype` can represent every value on the grid."""
        return 2.0 ** (_significand(dtype) - self.bits)

    def round(self, x: Tensor) -> Tensor:
        """Round x to the grid. Ties are rounded to even multiples, and zeros are positive.

        The derivative of rounding is treated as 1.
        """
        with torch.no_grad():
            rounded = torch.add(x.new_zeros(()), self._in_units(x), alpha=self.unit)
        # The difference and the sum are exact. Under autograd, the gradient passes the rounding unchanged.
        return x + (rounded - x).detach() if _differentiated() else rounded

    def add(self, x: Tensor, d: Tensor) -> Tensor:
        """Return x + round(d). The sum is exact if x is on the grid and the sum is within `limit`."""
        return x + self.round(d) if _differentiated() else torch.add(x, self._in_units(d), alpha=self.unit)

    def take_back(self, y: Tensor, d: Tensor) -> Tensor:
        """Return y - round(d). This is the x from which `add` computed y."""
        return y - self.round(d) if _differentiated() else torch.sub(y, self._in_units(d), alpha=self.unit)

    def add_(self, x: Tensor, d: Tensor) -> Tensor:
        """Run `add` in place. Gradients must be disabled."""
        return x.add_(self._in_units(d), alpha=self.unit)

    def take_back_(self, y: Tensor, d: Tensor) -> Tensor:
        """Run `take_back` in place. Gradients must be disabled."""
        return y.sub_(self._in_units(d), alpha=self.unit)

    @torch.no_grad()
    def residual(self, x: Tensor, estimate: Tensor) -> Residual:
        """Return the residual with which `restore` recovers x exactly, even if `estimate` is infinite or NaN."""
        codes = torch.sub(x, estimate).mul_(2.0**self.bits).to(torch.int8)
        error = torch.add(estimate, codes.to(x.dtype), alpha=self.unit).sub_(x)
        if not _any_escapes(codes, error):
            return Residual(codes, x.new_empty(0))
        escapes = error.ne(0).logical_or_(codes.eq(_ESCAPE))
        return Residual(codes.masked_fill_(escapes, _ESCAPE), x[escapes])

    @torch.no_grad()
    def restore(self, estimate: Tensor, residual: Residual) -> Tensor:
        """Recover x from its residual. `estimate` must be bit-identical to the estimate for which `residual` was computed."""
        codes, escaped = residual
        x = torch.add(estimate, codes.to(estimate.dtype), alpha=self.unit)
        return x.masked_scatter_(codes.eq(_ESCAPE), escaped) if len(escaped) else x

    def _in_units(self, x: Tensor) -> Tensor:
        """The nearest multiple, in units of the grid."""
        return x.mul(2.0**self.bits).round_()


def _differentiated() -> bool:
    """Whether autograd is on: in reverse mode, or in forward mode, which also runs under no_grad."""
    return torch.is_grad_enabled() or is_forward_ad()


def fingerprint(x: Tensor) -> Tensor:
    """The sum of all values' bits, read as integers: an int64 that changes with any single bit."""
    return x.view(_INTEGERS[x.element_size()]).sum(dtype=torch.int64)


class Extent:
    """Checks that the streams of one pass stay within the range of a grid."""

    def __init__(self, grid: Grid) -> None:
        self.source: tuple[str, object] | None = None
        """The block that makes the next streams, with its position; None for the input."""
        self._grid = grid
        # (source, dtype, minimum, maximum) of each stream; the extremes are read only once, in `outgrown`.
        self._seen: list[tuple[tuple[str, object] | None, torch.dtype, Tensor, Tensor]] = []

    def see(self, stream: Tensor) -> None:
        """Record the extremes of a stream of the current source."""
        if stream.numel():
            stream = unwrapped(stream.detach())
            self._seen.append((self.source, stream.dtype, stream.amin(), stream.amax()))

    def outgrown(self) -> tuple[tuple[str, object] | None, str] | None:
        """The first source of a stream out of range, with a message that names the remedy. On a GPU this waits once.

        The recorded extremes are dropped, because a graph may hold this object.
        """
        seen, self._seen = self._seen, []
        if not seen or seen[0][2].is_meta:
            return None
        home = seen[0][2].device
        ends = torch.stack([end.to(home, torch.float64) for _, _, *ends in seen for end in ends]).abs().tolist()
        for k, (source, dtype, _, _) in enumerate(seen):
            largest = max(ends[2 * k : 2 * k + 2], key=lambda end: math.inf if math.isnan(end) else end)
            # A value at the limit itself may be a sum that was rounded to it.
            if not largest < self._grid.limit(dtype):
                return source, self._message(dtype, largest)
        return None

    def _message(self, dtype: torch.dtype, largest: float) -> str:
        name, bits = str(dtype).removeprefix("torch."), self._grid.bits
        found = (
            f"reaches {largest:.4g}; on a grid of {bits} bits {name} covers values below {self._grid.limit(dtype):.4g}"
        )
        if not math.isfinite(largest):
            return (
                f"{found}. The network has diverged, its input has such values, or the dtype of its streams is too narrow: check "
                f"the input and the learning rate, or pass float32 streams"
            )
        enough = _significand(dtype) - math.frexp(largest)[1]
        if _significand(dtype) < _significand(torch.float32):
            return (
                f"{found}. Pass float32 streams, net(x.float()), also under autocast: the layers before a sequence may return "
                f"narrower ones"
            )
        if enough < 1:
            return f"{found}. Pass streams of a wider dtype, or normalize inside the conditioners"
        return (
            f"{found}. exact=revflow.Grid(bits={enough}) would cover this one. Or normalize inside the conditioners, or pass "
            f"streams of a wider dtype"
        )


def _any_escapes(codes: Tensor, error: Tensor) -> bool:
    """Whether a code is -128, or an estimate with its code differs from the true value. On a GPU this waits once.

    It compares extremes, since comparing element by element takes several times as long. Fake tensors have no values, so none of
    theirs escapes.
    """
    if not codes.numel() or isinstance(codes, FakeTensor) or codes.is_meta:
        return False
    low, high, code = torch.stack((error.amin(), error.amax(), codes.amin().to(error.dtype))).tolist()
    return not (low == high == 0 and code > _ESCAPE)


def _significand(dtype: torch.dtype) -> int:
    """The number of significant bits, the leading one included."""
    return 1 - round(math.log2(torch.finfo(dtype).eps))


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
