"""VPN: Video Pixel Networks (Kalchbrenner et al. 2017, https://arxiv.org/abs/1610.00527).

Shapes: as in crevnet.networks.video_model. Features are (B, 2 c, H, W) outside of blocks and (B, c, H, W) inside. All layers
have the full resolution, so frames are not padded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crevnet.networks.baselines.convlstm import ConvLSTMCell
from crevnet.networks.config import Loss, ModelConfig, check_at_least_one
from crevnet.networks.crevnet.cells import CellState
from crevnet.networks.shapes import with_static
from crevnet.networks.video_model import Model, VideoModel

VALUES = 256

MOST_GENERATED = 4096
"""Largest number of values (channels x height x width) in a frame for which generation is permitted, because it is slow."""


@dataclass(frozen=True)
class VPNConfig(ModelConfig):
    """Configuration of VPN.

    Args:
        width: channels inside a block.
        dilations: dilation of the convolutions in each encoder block.
        decoder_blocks: number of masked blocks in the decoder.
    """

    title: ClassVar[str] = "VPN"
    score_name: ClassVar[str] = "cross-entropy"
    feeds_back: ClassVar[bool] = False
    name: Literal["vpn"] = "vpn"
    width: int = 128
    dilations: tuple[int, ...] = (1, 2, 4, 8, 1, 2, 4, 8)
    decoder_blocks: int = 12

    def __post_init__(self) -> None:
        super().__post_init__()
        for dilation in self.dilations:
            check_at_least_one("dilations", dilation)
        check_at_least_one("decoder_blocks", self.decoder_blocks)
        if self.width < self.channels:
            raise ValueError(f"width must be at least the number of channels, {self.channels}, not {self.width}")


class VPN(VideoModel[VPNConfig]):
    """Predicts the probabilities of 256 values, for every channel of every pixel of the next frame.

    The encoders and a ConvLSTM condition a value on all earlier frames. Masked convolutions condition it on the values before
    it in its own frame, in the order of rows, columns and channels. As in every stack of masked 3x3 convolutions, the receptive
    field in the k-th row above extends only k pixels to the right.

    The default has 29.9 million parameters. Checkpoints are compared by the loss, because generating a frame value by value is
    slow.
    """

    def __init__(self, config: VPNConfig) -> None:
        super().__init__(config)
        width, channels, features = config.width, config.channels, 2 * config.width
        self.features = features
        self.encoder = nn.Sequential(
            nn.Conv2d(config.input_channels, features, 3, padding=1),
            *[ResidualMultiplicativeBlock(width, dilation) for dilation in config.dilations],
        )
        self.recurrence = ConvLSTMCell(features, features, 3)
        self.from_frame = MaskedConv2d(channels, features, 3, groups=channels, sees_own_group=False)
        self.decoder = nn.Sequential(
            *[ResidualMultiplicativeBlock(width, masked_groups=channels) for _ in range(config.decoder_blocks)],
            MaskedConv2d(features, VALUES * channels, 1, groups=channels),
        )

    def forward(self, frames: Tensor, static: Tensor | None = None) -> Tensor:
        """Logits of the values of frames 1 to T - 1, from `frames` (B, T, C, H, W): (B, T - 1, C, 256, H, W).

        They are conditioned on the true frames before, and on the true values before each value in its own frame.
        """
        self._check(frames, static, at_least=2)
        return torch.stack(list(self._logits(frames, static)), 1)

    def loss(
        self, frames: Tensor, static: Tensor | None = None, over: Loss = "all", fed: Sequence[bool] | None = None
    ) -> Tensor:
        """Mean cross-entropy, in nats per value, of the values round(255 x) of all frames but the first, or of future ones."""
        self._check(frames, static, at_least=2)
        self._truly_fed(frames.shape[1], fed)
        return self._losses(frames, static, over).mean()

    def scores(self, frames: Tensor, static: Tensor | None = None, number: int | None = None) -> Tensor:
        """The mean cross-entropy of each future frame's values, in nats per value, given the true values before each."""
        self._check(frames, static, at_least=2)
        return self._losses(frames, static, number or "future")

    def _losses(self, frames: Tensor, static: Tensor | None, over: Loss) -> Tensor:
        """The mean cross-entropy of each predicted frame in `over`."""
        chosen = self._chosen(over, frames.shape[1] - 1)
        values = (frames[:, 1:] * (VALUES - 1)).round().long().unbind(1)
        # Computed per step: a stack of all logits, and its gradient, would each take another 256 frames per step.
        losses = [
            F.cross_entropy(logits.flatten(0, 1), values[t].flatten(0, 1))
            for t, logits in enumerate(self._logits(frames[:, : chosen.stop + 1], static, chosen.start), chosen.start)
        ]
        return torch.stack(losses)

    def check_generation(self, height: int, width: int) -> None:
        values = self.config.channels * height * width
        if values > MOST_GENERATED:
            raise ValueError(
                f"VPN generates a frame value by value, in {values} passes at {height} x {width}; expected frames of at most "
                f"{MOST_GENERATED} values"
            )

    @torch.no_grad()
    def generate(self, past: Tensor, static: Tensor | None = None, horizon: int | None = None) -> Tensor:
        """The frames after `past` (B, T, C, H, W): (B, horizon, C, H, W).

        Each value is the expectation of its distribution, given the expectations before it. No values are sampled, because
        forecasts are compared by squared errors. This takes H W C decoder passes per frame and is intended for tiny frames.
        """
        self._check(past, static)
        horizon, state = self._horizon(horizon), self._initial_state(past)
        for frame in past.unbind(1):
            state = self._encode(frame, static, state)
        frames = [self._expected(state.h, past)]
        while len(frames) < horizon:
            state = self._encode(frames[-1], static, state)
            frames.append(self._expected(state.h, past))
        return torch.stack(frames, 1)

    def _logits(self, frames: Tensor, static: Tensor | None, first: int = 0) -> Iterator[Tensor]:
        """Logits (B, C, 256, H, W) of each frame after the first, starting with prediction `first`."""
        state = self._initial_state(frames)
        for t, (frame, following) in enumerate(pairwise(frames.unbind(1))):
            state = self._encode(frame, static, state)
            if t >= first:
                yield self._decode(state.h, following)

    def _initial_state(self, frames: Tensor) -> CellState:
        zeros = frames.new_zeros(frames.shape[0], self.features, *frames.shape[-2:])
        return CellState(zeros, zeros)

    def _encode(self, frame: Tensor, static: Tensor | None, state: CellState) -> CellState:
        """The state after another frame (B, C, H, W); its h conditions the next frame."""
        after: CellState = self.recurrence(self.encoder(with_static(frame, static)), state)
        return after

    def _decode(self, context: Tensor, frame: Tensor) -> Tensor:
        """Logits (B, C, 256, H, W) of a frame's values, each from the context and the earlier values of `frame` (B, C, H, W)."""
        values = self.decoder(context + self.from_frame(frame))
        logits: Tensor = values.unflatten(1, (self.config.channels, VALUES))
        return logits

    def _expected(self, context: Tensor, past: Tensor) -> Tensor:
        """The expected frame (B, C, H, W), computed value by value; later values are zero and masked."""
        frame = torch.zeros_like(past[:, 0])
        values = torch.linspace(0, 1, VALUES, dtype=context.dtype, device=context.device)
        for row in range(frame.shape[2]):
            for column in range(frame.shape[3]):
                for channel in range(frame.shape[1]):
                    logits = self._decode(context, frame)[:, channel, :, row, column]
                    frame[:, channel, row, column] = logits.softmax(1) @ values
        return frame


class ResidualMultiplicativeBlock(nn.Module):
    """RMB, section 4.2: h + W (MU(MU(W h))), for h (B, 2 c, H, W).

    Args:
        width: channels c inside the block.
        dilation: dilation of the 3x3 convolutions.
        masked_groups: if given, all convolutions are masked, with this number of color channels.
    """

    def __init__(self, width: int, dilation: int = 1, masked_groups: int | None = None) -> None:
        super().__init__()
        self.block = nn.Sequential(
            _convolution(2 * width, width, 1, 1, masked_groups),
            MultiplicativeUnit(width, dilation, masked_groups),
            MultiplicativeUnit(width, dilation, masked_groups),
            _convolution(width, 2 * width, 1, 1, masked_groups),
        )

    def forward(self, h: Tensor) -> Tensor:
        change: Tensor = self.block(h)
        return h + change


class MultiplicativeUnit(nn.Module):
    """MU, section 4.1: g1 tanh(g2 h + g3 u), with gates g1, g2, g3 and update u = tanh(W h), all 3x3 convolutions of h."""

    def __init__(self, width: int, dilation: int, masked_groups: int | None) -> None:
        super().__init__()
        self.gates = nn.ModuleList(_convolution(width, width, 3, dilation, masked_groups) for _ in range(4))

    def forward(self, h: Tensor) -> Tensor:
        g1, g2, g3, u = (gate(h) for gate in self.gates)
        return torch.sigmoid(g1) * torch.tanh(torch.sigmoid(g2) * h + torch.sigmoid(g3) * torch.tanh(u))


class MaskedConv2d(nn.Conv2d):
    """A convolution over only earlier values: rows above, pixels to the left, and earlier color channels of the same pixel.

    Mask B also includes the value's own color channel; mask A does not. The features are divided into consecutive groups of
    (almost) equal size, one for each color channel.

    Args:
        inside, outside: number of input and output channels.
        kernel: height and width, odd.
        groups: number of color channels.
        sees_own_group: whether to use mask B instead of mask A.
    """

    mask: Tensor

    def __init__(self, inside: int, outside: int, kernel: int, groups: int, sees_own_group: bool = True) -> None:
        super().__init__(inside, outside, kernel, padding=kernel // 2)
        mask, center = torch.zeros(outside, inside, kernel, kernel), kernel // 2
        mask[:, :, :center] = 1
        mask[:, :, center, :center] = 1
        seen, own = (torch.arange(count) * groups // count for count in (inside, outside))
        mask[:, :, center, center] = (seen <= own[:, None] if sees_own_group else seen < own[:, None]).float()
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=self.padding)


def _convolution(inside: int, outside: int, kernel: int, dilation: int, masked_groups: int | None) -> nn.Conv2d:
    if masked_groups is not None:
        return MaskedConv2d(inside, outside, kernel, masked_groups)
    return nn.Conv2d(inside, outside, kernel, padding=dilation * (kernel // 2), dilation=dilation)


MODEL = Model(VPNConfig, VPN)
