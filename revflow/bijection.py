"""Invertible rearrangements of streams, and the base class of every invertible block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

Streams = tuple[Tensor, ...]


class Bijection(nn.Module, ABC):
    """A block that can be undone: the base class for blocks of your own.

    Write `forward` and `inverse`, each from streams to a tuple of streams and each the other's inverse. Keyword arguments
    of the sequence's call reach both. In a `ReversibleSequence` such a block runs three times a training step (forward,
    inverse, forward with a graph); derive from `Coupling` where the block is one, and it runs twice.

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
        """The block's output, one tensor a stream."""

    @abstractmethod
    def inverse(self, *streams: Tensor, **context: Any) -> Streams:
        """The input that `forward` maps to `streams`."""

    def log_det(self, *streams: Tensor, **context: Any) -> Tensor:
        """log |det d forward / d streams|, one value a sample. `forward_with_log_det` needs it, nothing else does."""
        raise NotImplementedError(f"a {type(self).__name__} has no log-determinant: write its method log_det")


class PixelUnshuffle(Bijection):
    """Bijective downsampling of every stream: (..., C, H, W) -> (..., factor² C, H / factor, W / factor).

    channel_dim: where C is, if not in front of H and W: 1 for what a three-dimensional convolution works on,
        (B, C, D, H, W) -> (B, factor² C, D, H / factor, W / factor).

    A pixel's channels come out in the order (row offset, column offset, channel), as in i-RevNet (Jacobsen et al. 2018,
    section 3.1): split in halves, a factor of 2 gives the even and the odd rows. `torch.nn.PixelUnshuffle` orders them
    (channel, row offset, column offset), which would part the channels instead. Raises ValueError where H or W is no
    multiple of `factor`, or C of its square in `inverse`.

    Examples:
        >>> net = revflow.ReversibleSequence([revflow.PixelUnshuffle(2)])
        >>> net(torch.randn(1, 6, 8, 8)).shape
        torch.Size([1, 24, 4, 4])
    """

    def __init__(self, factor: int, channel_dim: int = -3) -> None:
        super().__init__()
        if factor < 1:
            raise ValueError(f"factor has to be at least 1, not {factor}")
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
                f"PixelUnshuffle({f}) takes (..., C, H, W) with H and W multiples of {f}; got {tuple(x.shape)}: pad the image"
            )
        channels = self.channel_dim % x.dim()
        cells = x.unflatten(-1, (-1, f)).unflatten(-3, (-1, f))  # ..., C, ..., h, row offset, w, column offset
        return _in_format_of(x, cells.movedim((-3, -1), (channels, channels + 1)).flatten(channels, channels + 2))

    def _shuffle(self, x: Tensor) -> Tensor:
        f = self.factor
        if x.dim() < 3 or x.shape[self.channel_dim] % f**2:
            raise ValueError(
                f"PixelUnshuffle({f}).inverse takes (..., C, H, W) with C a multiple of {f**2}; got {tuple(x.shape)}"
            )
        channels = self.channel_dim % x.dim()
        cells = x.unflatten(channels, (f, f, -1)).movedim((channels, channels + 1), (-3, -1))
        return _in_format_of(x, cells.flatten(-2, -1).flatten(-3, -2))


def _in_format_of(x: Tensor, y: Tensor) -> Tensor:
    by_channels = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if by_channels is None or x.is_contiguous() or not x.is_contiguous(memory_format=by_channels):
        return y.contiguous()
    return y.contiguous(memory_format=by_channels)
