"""The two-way autoencoder: a bijection whose forward pass encodes and whose inverse decodes (Yu et al. 2019, section 2.1).

Shapes: B batch, Ci channels of a frame, Hp x Wp its height and width, D the downsampling factor, N channels of one latent
stream, K frames of a clip. In a network of clips, the dimension K follows the channels of a stream.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import revflow
from crevnet.networks.config import CrevNetConfig
from crevnet.networks.convolution import channels_last, convolution

Latent = tuple[Tensor, Tensor]
"""Two streams, each (B, N, Hp / D, Wp / D), or (B, N, K, Hp / D, Wp / D)."""


class TwoWayAutoencoder(nn.Module):
    """A reversible network that encodes frames into latents and decodes latents into frames with the same parameters.

    The activations between blocks are not stored during training. As in the authors' code, i-RevNet blocks are used: each block
    consists of one coupling, followed by a swap of the two streams. A frame is pixel-unshuffled before it is split, so one
    stream initially contains the even rows and the other the odd rows. The height and width of a frame must be multiples of D.

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
        """Encode frames (B, Ci, Hp, Wp) or clips (B, K, Ci, Hp, Wp). This method is E in eq. 1 of the paper."""
        # In the memory format of the weights, which streams, latents and states inherit.
        by_rows = next(self.parameters()).is_contiguous()
        layout = torch.contiguous_format if by_rows else self._channels_last
        z1, z2 = self.blocks((frames.movedim(-3, 1).contiguous(memory_format=layout),))
        return z1, z2

    def decode(self, latent: Latent) -> Tensor:
        """Return the frames or clips that `encode` maps to `latent`. This method is E⁻¹ in eq. 4 of the paper."""
        frames: Tensor
        (frames,) = self.blocks.inverse(latent)
        return frames.movedim(1, -3)


class _Rows(revflow.Bijection):
    """A frame's even and odd rows, unshuffled: (B, C, ..., H, W) -> two streams of (B, 2 C, ..., H / 2, W / 2).

    It is a block of the sequence, so that the sequence and later operations store the same tensor of a decoded frame.
    """

    def __init__(self) -> None:
        super().__init__()
        self._unshuffle = revflow.PixelUnshuffle(2, channel_dim=1)

    def forward(self, *streams: Tensor, **context: Any) -> Latent:
        (cells,) = self._unshuffle(*streams)
        # Halves of one storage would keep each other in memory. A clone preserves channels_last.
        even, odd = (half.clone() for half in cells.chunk(2, 1))
        return even, odd

    def inverse(self, *streams: Tensor, **context: Any) -> tuple[Tensor, ...]:
        return self._unshuffle.inverse(torch.cat(streams, 1))


class _Shuffle(nn.Module):
    """The inverse of PixelUnshuffle, so that a strided convolution gets the stream at its resolution before the unshuffle."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self._unshuffle = revflow.PixelUnshuffle(factor, channel_dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return self._unshuffle.inverse(x)[0]


def _residual(config: CrevNetConfig, width: int, stride: int, first: bool) -> nn.Sequential:
    """F of a block: three 3x3 convolutions, pre-activated except in the very first block.

    `width` is the number of channels of a stream before the block's unshuffle by `stride`. The authors' Moving MNIST code has
    BatchNorm instead of GroupNorm, with equally many parameters. Batch statistics would differ between encoding and decoding, so
    decoding would not invert encoding.
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
