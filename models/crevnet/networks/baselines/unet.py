"""U-Net, the baseline that Traffic4cast's organisers gave in 2021: past frames in, future frames out, no recurrence.

After https://github.com/iarai/NeurIPS2021-traffic4cast, baselines/unet.py and baselines_configs.py, which is
https://github.com/jvanvugt/pytorch-unet with padding, batch norm and transposed convolutions; Ronneberger et al. 2015,
https://arxiv.org/abs/1505.04597.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crevnet.networks.config import Loss, ModelConfig, check_at_least_one
from crevnet.networks.shapes import cropped, mean_squared_error, padded, with_static
from crevnet.networks.video_model import VideoModel


@dataclass(frozen=True)
class UNetConfig(ModelConfig):
    """The U-Net's sizes.

    Args:
        depth: number of resolutions. Frames are padded to multiples of 2^(depth - 1).
        width: channels at full resolution; twice as many at each lower one.
    """

    title: ClassVar[str] = "U-Net"
    feeds_back: ClassVar[bool] = False
    name: Literal["unet"] = "unet"
    depth: int = 5
    width: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one("depth", self.depth)
        check_at_least_one("width", self.width)


class UNet(VideoModel[UNetConfig]):
    """Predicts all frames of the horizon at once, from exactly `past` ones in a stack of channels, with the static ones once."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        widths = [config.width * 2**level for level in range(config.depth)]
        inputs = [config.past * config.channels + config.static_channels, *widths[:-1]]
        self.down = nn.ModuleList(Block(inside, out) for inside, out in zip(inputs, widths, strict=True))
        self.up = nn.ModuleList(UpBlock(2 * out, out) for out in reversed(widths[:-1]))
        self.to_frames = nn.Conv2d(config.width, config.horizon * config.channels, 1)

    def forward(self, frames: Tensor, static: Tensor | None = None) -> Tensor:
        """(B, past, C, H, W) -> the frames after them, (B, horizon, C, H, W)."""
        self._check(frames, static)
        self._check_count(frames, self.config.past)
        x = padded(with_static(frames.flatten(1, 2), static), 2 ** len(self.up))
        skips = []
        for block in self.down[:-1]:
            skips.append(block(x))
            x = F.max_pool2d(skips[-1], 2)
        x = self.down[-1](x)
        for block, skip in zip(self.up, reversed(skips), strict=True):
            x = block(x, skip)
        return cropped(self.to_frames(x), frames).unflatten(1, (self.config.horizon, self.config.channels))

    def loss(
        self, frames: Tensor, static: Tensor | None = None, over: Loss = "all", fed: Sequence[bool] | None = None
    ) -> Tensor:
        """Mean squared error of the predicted frames of a window (B, past + horizon, C, H, W): "all" are future ones."""
        self._check(frames, static)
        self._check_count(frames, self.config.window)
        chosen = list(self._chosen(over, self.config.horizon))
        self._truly_fed(frames.shape[1], fed)
        past, future = frames.split([self.config.past, self.config.horizon], 1)
        return mean_squared_error(self(past, static)[:, chosen], future[:, chosen])

    @torch.no_grad()
    def generate(self, past: Tensor, static: Tensor | None = None, horizon: int | None = None) -> Tensor:
        """The frames after `past` (B, past, C, H, W): (B, horizon, C, H, W), not clipped. Where the model's own horizon is
        shorter, the last frames, predicted ones among them, are its next past."""
        horizon, frames = self._horizon(horizon), past
        while frames.shape[1] < past.shape[1] + horizon:
            frames = torch.cat((frames, self(frames[:, -past.shape[1] :], static)), 1)
        return frames[:, past.shape[1] : past.shape[1] + horizon]

    @staticmethod
    def _check_count(frames: Tensor, count: int) -> None:
        if frames.shape[1] != count:
            raise ValueError(f"frames have to be {count} in time for this model; got {frames.shape[1]}")


class Block(nn.Sequential):
    """Twice: convolution, ReLU, batch norm."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(nn.Conv2d(channels, width, 3, padding=1), *_rest_of_block(width))


class UpBlock(nn.Module):
    """A transposed convolution to twice the resolution, and a block of its output and the skip connection's."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.upsample = nn.ConvTranspose2d(channels, width, 2, stride=2)
        # The block's first convolution: one of [x, skip] would keep a copy of both for the backward pass.
        self.from_below = nn.Conv2d(width, width, 3, padding=1)
        self.from_skip = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.rest = nn.Sequential(*_rest_of_block(width))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.rest(self.from_below(self.upsample(x)) + self.from_skip(skip))


def _rest_of_block(width: int) -> list[nn.Module]:
    """What follows a block's first convolution."""
    convolution = nn.Conv2d(width, width, 3, padding=1)
    return [nn.ReLU(), nn.BatchNorm2d(width), convolution, nn.ReLU(), nn.BatchNorm2d(width)]
