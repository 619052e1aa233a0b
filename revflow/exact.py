"""Exact arithmetic in floating point: numbers on a grid, where sums can be taken back to the last bit.

A float of p significant bits (24 for float32) holds every multiple of 2^-bits up to 2^(p - bits). Sums and differences of
such multiples that stay in that range are not rounded. So y = x + d is undone by x = y - d exactly, however many blocks
there are, once d is on the grid. Where a stream is not only shifted but scaled, rounding loses information: what it loses
is a `Residual`, mostly one byte a value.

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
"""The code of a value that is kept as it is."""


class Residual(NamedTuple):
    """What an estimate lacks of the true value.

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
    """int8: true value - estimate, in units of the grid; -128 where that is too large for a byte."""
    escaped: Tensor
    """The true values of those, in the order in which they stand."""


@dataclass(frozen=True)
class Grid:
    """The multiples of 2^-bits. In float32, 16 bits hold values up to 256 in steps of 1.5e-5.

    More bits are finer and hold less: streams that outgrow the range are an error, which names the bits that would do. Raises
    ValueError where `bits` is no whole number from 1 to 52.

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
            raise ValueError(f"a grid's bits have to be a whole number from 1 to 52, not {self.bits!r}")

    @property
    def unit(self) -> float:
        """The distance between two neighbours."""
        return 2.0**-self.bits

    def limit(self, dtype: torch.dtype) -> float:
        """The largest absolute value up to which a tensor of `dtype` holds the whole grid."""
        return 2.0 ** (_significand(dtype) - self.bits)

    def round(self, x: Tensor) -> Tensor:
        """The nearest multiple, the even one in the middle between two; zeros are positive. Its derivative is taken as 1."""
        with torch.no_grad():
            rounded = torch.add(x.new_zeros(()), self._in_units(x), alpha=self.unit)
        # The difference is exact, and so is the sum; under autograd the gradient passes the rounding unchanged.
        return x + (rounded - x).detach() if _differentiated() else rounded

    def add(self, x: Tensor, d: Tensor) -> Tensor:
        """x + round(d), exact where x is on the grid and the sum within `limit`."""
        return x + self.round(d) if _differentiated() else torch.add(x, self._in_units(d), alpha=self.unit)

    def take_back(self, y: Tensor, d: Tensor) -> Tensor:
        """y - round(d): the x of which `add` has made y."""
        return y - self.round(d) if _differentiated() else torch.sub(y, self._in_units(d), alpha=self.unit)

    def add_(self, x: Tensor, d: Tensor) -> Tensor:
        """As `add`, in x's place; gradients have to be off."""
        return x.add_(self._in_units(d), alpha=self.unit)

    def take_back_(self, y: Tensor, d: Tensor) -> Tensor:
        """As `take_back`, in y's place; gradients have to be off."""
        return y.sub_(self._in_units(d), alpha=self.unit)

    @torch.no_grad()
    def residual(self, x: Tensor, estimate: Tensor) -> Residual:
        """What `restore` needs to make x, to the last bit, of any `estimate` of it (infinite or not a number, even)."""
        codes = torch.sub(x, estimate).mul_(2.0**self.bits).to(torch.int8)
        error = torch.add(estimate, codes.to(x.dtype), alpha=self.unit).sub_(x)
        if not _any_escapes(codes, error):
            return Residual(codes, x.new_empty(0))
        escapes = error.ne(0).logical_or_(codes.eq(_ESCAPE))
        return Residual(codes.masked_fill_(escapes, _ESCAPE), x[escapes])

    @torch.no_grad()
    def restore(self, estimate: Tensor, residual: Residual) -> Tensor:
        """The x of which `residual` was taken with this very estimate."""
        codes, escaped = residual
        x = torch.add(estimate, codes.to(estimate.dtype), alpha=self.unit)
        return x.masked_scatter_(codes.eq(_ESCAPE), escaped) if len(escaped) else x

    def _in_units(self, x: Tensor) -> Tensor:
        return x.mul(2.0**self.bits).round_()


def _differentiated() -> bool:
    """By reverse mode or by forward mode, which runs under no_grad too."""
    return torch.is_grad_enabled() or is_forward_ad()


def fingerprint(x: Tensor) -> Tensor:
    """The sum of all values' bits, read as whole numbers: an int64 that changes with any single bit."""
    return x.view(_INTEGERS[x.element_size()]).sum(dtype=torch.int64)


class Extent:
    """Sees that the streams of one pass stay within the range of a grid."""

    def __init__(self, grid: Grid) -> None:
        self.source: tuple[str, object] | None = None
        """The block that makes the streams which are seen next, with its position; None for the input."""
        self._grid = grid
        self._seen: list[tuple[tuple[str, object] | None, torch.dtype, Tensor, Tensor]] = []

    def see(self, stream: Tensor) -> None:
        if stream.numel():
            stream = unwrapped(stream.detach())
            self._seen.append((self.source, stream.dtype, stream.amin(), stream.amax()))

    def outgrown(self) -> tuple[tuple[str, object] | None, str] | None:
        """The first source of a stream out of range, and what to do about it. On a GPU this waits once.

        What was seen is forgotten: a graph would keep it.
        """
        seen, self._seen = self._seen, []
        if not seen or seen[0][2].is_meta:
            return None
        home = seen[0][2].device
        ends = torch.stack([end.to(home, torch.float64) for _, _, *ends in seen for end in ends]).abs().tolist()
        for k, (source, dtype, _, _) in enumerate(seen):
            largest = max(ends[2 * k : 2 * k + 2], key=lambda end: math.inf if math.isnan(end) else end)
            # At the limit itself may be a sum that was rounded to it.
            if not largest < self._grid.limit(dtype):
                return source, self._message(dtype, largest)
        return None

    def _message(self, dtype: torch.dtype, largest: float) -> str:
        name, bits = str(dtype).removeprefix("torch."), self._grid.bits
        found = (
            f"reaches {largest:.4g}; on a grid of {bits} bits {name} holds values below {self._grid.limit(dtype):.4g}"
        )
        if not math.isfinite(largest):
            return (
                f"{found}. Nothing holds this: the network has diverged, or was given such values, or its streams are of too "
                f"narrow a dtype"
            )
        enough = _significand(dtype) - math.frexp(largest)[1]
        if _significand(dtype) < _significand(torch.float32):
            return (
                f"{found}. Pass float32 streams, net(x.float()) say, under autocast too: what is in front of a sequence may have "
                f"left it half of that"
            )
        if enough < 1:
            return f"{found}. Pass streams of a wider dtype, or normalise inside the conditioners"
        return (
            f"{found}. exact=revflow.Grid(bits={enough}) would hold this one; or normalise inside the conditioners, or pass "
            f"streams of a wider dtype"
        )


def _any_escapes(codes: Tensor, error: Tensor) -> bool:
    """By extremes, since comparing element by element takes several times as long. On a GPU this waits once.

    Of fake tensors, whose values are unknown, none is said to escape.
    """
    if not codes.numel() or isinstance(codes, FakeTensor) or codes.is_meta:
        return False
    low, high, code = torch.stack((error.amin(), error.amax(), codes.amin().to(error.dtype))).tolist()
    return not (low == high == 0 and code > _ESCAPE)


def _significand(dtype: torch.dtype) -> int:
    """Bits of precision, the leading one included."""
    return 1 - round(math.log2(torch.finfo(dtype).eps))


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
