"""The two-way autoencoder: a bijection whose forward pass encodes and whose inverse decodes (Yu et al. 2019, section 2.1).

Shapes: B batch, C channels of a frame, H x W its height and width, D the downsampling, N channels of one latent stream, K
frames of a clip. In a network that sees clips, streams have the dimension K behind their channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import revflow
from crevnet.networks.config import CrevNetConfig
from crevnet.networks.convolution import channels_last, convolution

Latent = tuple[Tensor, Tensor]
"""Two streams, each (B, N, H / D, W / D), or (B, N, K, H / D, W / D)."""


class TwoWayAutoencoder(nn.Module):
    """Frames (B, C, H, W), or clips (B, K, C, H, W), <-> latents, with one set of parameters for both ways and no activation
    stored between blocks.

    The blocks are i-RevNet's with one coupling and a swap each, as in the authors' code. The frame is unshuffled first and
    then split, so that the two streams begin as its even and its odd rows. H and W have to be multiples of D.

    Examples:
        >>> config = crevnet.CrevNetConfig(channels=1, static=(), blocks=(1,), strides=(2,), modules=2)
        >>> autoencoder = crevnet.TwoWayAutoencoder(config)
        >>> frame = torch.rand(1, 1, 16, 16)
        >>> torch.allclose(autoencoder.decode(autoencoder.encode(frame)), frame, atol=1e-5)
        True
    """

    def __init__(self, config: CrevNetConfig) -> None:
        super().__init__()
        blocks: list[nn.Module] = [_Rows()]
        width = 2 * config.input_channels
        for count, stride in zip(config.blocks, config.strides, strict=True):
            for k in range(count):
                first, step = len(blocks) == 1, stride if k == 0 else 1
                if step > 1:
                    blocks.append(revflow.PixelUnshuffle(step, channel_dim=1))
                blocks.append(revflow.AdditiveCoupling(_residual(config, width, step, first)))
                width *= step**2
        self.blocks = revflow.ReversibleSequence(blocks, exact=config.grid or False)
        self._channels_last = channels_last(config.clip)

    def encode(self, frames: Tensor) -> Latent:
        """E of the paper's eq. 1."""
        # In the layout of the weights, which streams, latents and states then have.
        by_rows = next(self.parameters()).is_contiguous()
        layout = torch.contiguous_format if by_rows else self._channels_last
        z1, z2 = self.blocks((frames.movedim(-3, 1).contiguous(memory_format=layout),))
        return z1, z2

    def decode(self, latent: Latent) -> Tensor:
        """E⁻¹ of the paper's eq. 4: the frames whose encoding `latent` is."""
        (frames,) = self.blocks.inverse(latent)
        return frames.movedim(1, -3)


class _Rows(revflow.Bijection):
    """A frame's even and odd rows, unshuffled: (B, C, ..., H, W) -> two streams of (B, 2 C, ..., H / 2, W / 2).

    A block of the chain, so that of a decoded frame the chain and whatever follows keep the same tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self._unshuffle = revflow.PixelUnshuffle(2, channel_dim=1)

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
        self._unshuffle = revflow.PixelUnshuffle(factor, channel_dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return self._unshuffle.inverse(x)[0]


def _residual(config: CrevNetConfig, width: int, stride: int, first: bool) -> nn.Sequential:
    """F of a block: three 3x3 convolutions, pre-activated except in the very first block.

    `width` counts the channels of a stream in front of the block's unshuffle by `stride`. The authors' Moving MNIST code has
    BatchNorm for GroupNorm, of as many parameters: statistics of a batch would be others where it is decoded than where it
    was encoded, and decoding would not undo encoding.
    """
    out = width * stride**2
    inner = max(out // config.bottleneck, 1)
    return nn.Sequential(
        *([_Shuffle(stride)] if stride > 1 else []),
        *([] if first else [nn.GroupNorm(1, width), nn.ReLU()]),
        convolution(config.clip, width, inner, 3, stride, bias=False),
        nn.GroupNorm(1, inner),
        nn.ReLU(),
        convolution(config.clip, inner, inner, 3, bias=False),
        nn.GroupNorm(1, inner),
        nn.ReLU(),
        convolution(config.clip, inner, out, 3, bias=False),
    )
