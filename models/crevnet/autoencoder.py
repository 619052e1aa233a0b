"""The two-way autoencoder: a bijection whose forward pass encodes and whose inverse decodes (Yu et al. 2019, section 2.1).

Shapes: B batch, C channels of a frame, H x W its height and width, D the downsampling, N channels of one latent stream.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import revflow
from crevnet.config import CrevNetConfig

Latent = tuple[Tensor, Tensor]
"""Two streams, each (B, N, H / D, W / D)."""


class TwoWayAutoencoder(nn.Module):
    """Frames (B, C, H, W) <-> latents, with one set of parameters for both ways and no activation stored between blocks.

    The blocks are i-RevNet's with one coupling and a swap each, as in the authors' code. The frame is unshuffled first and
    then split, so that the two streams begin as its even and its odd rows. H and W have to be multiples of D.
    """

    def __init__(self, config: CrevNetConfig) -> None:
        super().__init__()
        blocks: list[nn.Module] = [_Rows()]
        width = 2 * config.input_channels
        for count, stride in zip(config.blocks, config.strides, strict=True):
            for k in range(count):
                first, step = len(blocks) == 1, stride if k == 0 else 1
                if step > 1:
                    blocks.append(revflow.PixelUnshuffle(step))
                blocks.append(revflow.AdditiveCoupling(_residual(width, step, config.bottleneck, first)))
                width *= step**2
        self.blocks = revflow.ReversibleSequence(blocks, exact=config.grid or False)

    def encode(self, frames: Tensor) -> Latent:
        """E of the paper's eq. 1."""
        # In the layout of the weights, which streams, latents and states then have.
        by_rows = next(self.parameters()).is_contiguous()
        frames = frames.contiguous(memory_format=torch.contiguous_format if by_rows else torch.channels_last)
        z1, z2 = self.blocks((frames,))
        return z1, z2

    def decode(self, latent: Latent) -> Tensor:
        """E⁻¹ of the paper's eq. 4: the frames whose encoding `latent` is."""
        (frames,) = self.blocks.inverse(latent)
        return frames


class _Rows(revflow.Bijection):
    """A frame's even and odd rows, unshuffled: (C, H, W) -> two streams of (2 C, H / 2, W / 2).

    A block of the chain, so that of a decoded frame the chain and whatever follows keep the same tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self._unshuffle = revflow.PixelUnshuffle(2)

    def forward(self, frames: Tensor) -> Latent:
        (cells,) = self._unshuffle(frames)
        # Halves of one storage would keep each other alive. A clone keeps channels_last.
        even, odd = (half.clone() for half in cells.chunk(2, 1))
        return even, odd

    def inverse(self, even: Tensor, odd: Tensor) -> tuple[Tensor]:
        (frames,) = self._unshuffle.inverse(torch.cat((even, odd), 1))
        return (frames,)


class _Shuffle(nn.Module):
    """The inverse of PixelUnshuffle: lets a strided convolution see the stream at its resolution before the unshuffle."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self._unshuffle = revflow.PixelUnshuffle(factor)

    def forward(self, x: Tensor) -> Tensor:
        return self._unshuffle.inverse(x)[0]


def _residual(width: int, stride: int, bottleneck: int, first: bool) -> nn.Sequential:
    """F of a block: three 3x3 convolutions, pre-activated except in the very first block.

    `width` counts the channels of a stream in front of the block's unshuffle by `stride`.
    """
    out = width * stride**2
    inner = max(out // bottleneck, 1)
    return nn.Sequential(
        *([_Shuffle(stride)] if stride > 1 else []),
        *([] if first else [nn.GroupNorm(1, width), nn.ReLU()]),
        nn.Conv2d(width, inner, 3, stride=stride, padding=1, bias=False),
        nn.GroupNorm(1, inner),
        nn.ReLU(),
        nn.Conv2d(inner, inner, 3, padding=1, bias=False),
        nn.GroupNorm(1, inner),
        nn.ReLU(),
        nn.Conv2d(inner, out, 3, padding=1, bias=False),
    )
