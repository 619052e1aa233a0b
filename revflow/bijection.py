"""The base class of every invertible block, and invertible rearrangements of streams."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

Streams = tuple[Tensor, ...]


class Bijection(nn.Module, ABC):
    """The base class of all invertible blocks, including custom blocks.

    A subclass must define `forward` and `inverse`. Both methods take streams and return a tuple of streams, and each inverts the
    other. Keyword arguments of a call to the sequence are passed to both methods. In a `ReversibleSequence`,
    such a block is evaluated three times per training step: forward, inverse, and forward with a graph. If the block is a
    coupling, derive it from `Coupling`, which requires only two evaluations.

    Examples:
        >>> class Negation(revflow.Bijection):
        ...     def forward(self, *streams, **context):
        ...         return tuple(-stream for stream in streams)
        ...
        ...     def inverse(self, *streams, **context):
        ...         return tuple(-stream for stream in streams)
        >>> net = revflow.ReversibleSequence([revflow.AdditiveCoupling(torch.nn.Linear(4, 4)), Negation()])
        >>> net(torch.randn(2, 8)).shape
        torch.Size([2, 8])
    """

    @abstractmethod
    def forward(self, *streams: Tensor, **context: Any) -> Streams:
        """Return the output of the block, a tuple with one tensor per stream."""

    @abstractmethod
    def inverse(self, *streams: Tensor, **context: Any) -> Streams:
        """Return the input that `forward` maps to `streams`, a tuple with one tensor per stream."""

    def log_det(self, *streams: Tensor, **context: Any) -> Tensor:
        """Return log |det d forward / d streams| as a tensor of shape (batch,), with one value per sample.

        This method is called only by `ReversibleSequence.forward_with_log_det`.
        """
        raise NotImplementedError(f"a {type(self).__name__} has no log-determinant: write its method log_det")


class PixelUnshuffle(Bijection):
    """Invertible downsampling of every stream: (..., C, H, W) -> (..., factor² C, H / factor, W / factor).

    The new channels are ordered by (row offset, column offset, channel), as in i-RevNet (Jacobsen et al. 2018, section 3.1). If
    the factor is 2, the first half of the channels contains the even rows, and the second half contains the odd rows.
    `torch.nn.PixelUnshuffle` orders the channels by (channel, row offset, column offset). With that order, splitting the channels
    in half would separate the original channels from one another.

    Args:
        factor: Downsampling factor for both H and W.
        channel_dim: Dimension of C; by default, the dimension before H and W. For inputs to three-dimensional convolutions, use
            1: (B, C, D, H, W) -> (B, factor² C, D, H / factor, W / factor).

    Raises:
        ValueError: If H or W is not a multiple of `factor` or, in `inverse`, if C is not a multiple of `factor` squared.

    Examples:
        >>> net = revflow.ReversibleSequence([revflow.PixelUnshuffle(2)])
        >>> net(torch.randn(1, 6, 8, 8)).shape
        torch.Size([1, 24, 4, 4])
    """

    def __init__(self, factor: int, channel_dim: int = -3) -> None:
        super().__init__()
        if factor < 1:
            raise ValueError(f"factor must be at least 1; got {factor}")
        self.factor, self.channel_dim = factor, channel_dim

    def forward(self, *streams: Tensor, **context: Any) -> Streams:
        return tuple(self._unshuffle(s) for s in streams)

    def inverse(self, *streams: Tensor, **context: Any) -> Streams:
        return tuple(self._shuffle(s) for s in streams)

    def log_det(self, *streams: Tensor, **context: Any) -> Tensor:
        return streams[0].new_zeros(len(streams[0]))

    def extra_repr(self) -> str:
        return f"{self.factor}" if self.channel_dim == -3 else f"{self.factor}, channel_dim={self.channel_dim}"

    def _unshuffle(self, x: Tensor) -> Tensor:
        f = self.factor
        if x.dim() < 3 or x.shape[-2] % f or x.shape[-1] % f:
            raise ValueError(
                f"PixelUnshuffle({f}) requires (..., C, H, W) with H and W multiples of {f}; got {tuple(x.shape)}: pad the image"
            )
        channels = self.channel_dim % x.dim()
        cells = x.unflatten(-1, (-1, f)).unflatten(-3, (-1, f))  # (..., C, ..., h, row offset, w, column offset)
        return _in_format_of(x, cells.movedim((-3, -1), (channels, channels + 1)).flatten(channels, channels + 2))

    def _shuffle(self, x: Tensor) -> Tensor:
        f = self.factor
        if x.dim() < 3 or x.shape[self.channel_dim] % f**2:
            raise ValueError(
                f"PixelUnshuffle({f}).inverse requires (..., C, H, W) with C a multiple of {f**2}; got {tuple(x.shape)}: pass "
                f"streams that a PixelUnshuffle({f}) returned"
            )
        channels = self.channel_dim % x.dim()
        cells = x.unflatten(channels, (f, f, -1)).movedim((channels, channels + 1), (-3, -1))
        return _in_format_of(x, cells.flatten(-2, -1).flatten(-3, -2))


def _in_format_of(x: Tensor, y: Tensor) -> Tensor:
    """The tensor y in the memory format of x: channels_last, or contiguous."""
    by_channels = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if by_channels is None or x.is_contiguous() or not x.is_contiguous(memory_format=by_channels):
        return y.contiguous()
    return y.contiguous(memory_format=by_channels)
