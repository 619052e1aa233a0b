"""U-Net (Ronneberger et al. 2015, https://arxiv.org/abs/1505.04597): all future frames from the past ones, without recurrence.

This is the baseline of Traffic4cast's organizers in 2021, https://github.com/iarai/NeurIPS2021-traffic4cast, baselines/unet.py
and baselines_configs.py. Theirs is https://github.com/jvanvugt/pytorch-unet with padding, batch norm and transposed convolutions.
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
from crevnet.networks.video_model import Model, VideoModel


@dataclass(frozen=True)
class UNetConfig(ModelConfig):
    """Configuration of the U-Net.

    Args:
        depth: number of resolutions. Frames are padded to multiples of 2^(depth - 1).
        width: channels at full resolution; each lower resolution has twice as many.
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
    """Predicts all frames of the horizon at once. The input stacks exactly `past` frames and the static channels."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        widths = [config.width * 2**level for level in range(config.depth)]
        inputs = [config.past * config.channels + config.static_channels, *widths[:-1]]
        self.down = nn.ModuleList(Block(inside, out) for inside, out in zip(inputs, widths, strict=True))
        self.up = nn.ModuleList(UpBlock(2 * out, out) for out in reversed(widths[:-1]))
        self.to_frames = nn.Conv2d(config.width, config.horizon * config.channels, 1)

    def forward(self, frames: Tensor, static: Tensor | None = None) -> Tensor:
        """The frames after `frames` (B, past, C, H, W): (B, horizon, C, H, W)."""
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
        shape = (self.config.horizon, self.config.channels)
        predicted: Tensor = cropped(self.to_frames(x), frames).unflatten(1, shape)
        return predicted

    def loss(
        self, frames: Tensor, static: Tensor | None = None, over: Loss = "all", fed: Sequence[bool] | None = None
    ) -> Tensor:
        """Mean squared error of the predicted frames of a window (B, past + horizon, C, H, W).

        All predictions are future frames, so "all" equals "future".
        """
        self._check(frames, static)
        self._check_count(frames, self.config.window)
        chosen = list(self._chosen(over, self.config.horizon))
        self._truly_fed(frames.shape[1], fed)
        past, future = frames.split([self.config.past, self.config.horizon], 1)
        return mean_squared_error(self(past, static)[:, chosen], future[:, chosen])

    @torch.no_grad()
    def generate(self, past: Tensor, static: Tensor | None = None, horizon: int | None = None) -> Tensor:
        """The frames after `past` (B, past, C, H, W): (B, horizon, C, H, W), not clipped.

        If the model's own horizon is shorter, its next input is the last frames, including predicted ones.
        """
        horizon, frames = self._horizon(horizon), past
        while frames.shape[1] < past.shape[1] + horizon:
            frames = torch.cat((frames, self(frames[:, -past.shape[1] :], static)), 1)
        return frames[:, past.shape[1] : past.shape[1] + horizon]

    @staticmethod
    def _check_count(frames: Tensor, count: int) -> None:
        if frames.shape[1] != count:
            raise ValueError(f"frames must have {count} time steps for this model; got {frames.shape[1]}")


class Block(nn.Sequential):
    """Convolution, ReLU and batch norm, twice."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(nn.Conv2d(channels, width, 3, padding=1), *_rest_of_block(width))


class UpBlock(nn.Module):
    """A transposed convolution to twice the resolution, and a block over its output and the skip connection."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.upsample = nn.ConvTranspose2d(channels, width, 2, stride=2)
        # The block's first convolution, in two parts: one over [x, skip] would store a copy of both for the backward pass.
        self.from_below = nn.Conv2d(width, width, 3, padding=1)
        self.from_skip = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.rest = nn.Sequential(*_rest_of_block(width))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.from_below(self.upsample(x)) + self.from_skip(skip)
        out: Tensor = self.rest(x)
        return out


def _rest_of_block(width: int) -> list[nn.Module]:
    """The modules after a block's first convolution."""
    convolution = nn.Conv2d(width, width, 3, padding=1)
    return [nn.ReLU(), nn.BatchNorm2d(width), convolution, nn.ReLU(), nn.BatchNorm2d(width)]


MODEL = Model(UNetConfig, UNet)
