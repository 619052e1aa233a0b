"""What every video model gives, CrevNet and the baselines alike, so that training and scores need not tell them apart.

Shapes: B batch, T frames, C data channels, S static ones, H x W a frame's height and width. Values in [0, 1].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crevnet.networks.config import Loss, ModelConfig, check_at_least_one
from crevnet.networks.shapes import check_window

Config = TypeVar("Config", bound=ModelConfig)


class VideoModel(nn.Module, ABC, Generic[Config]):
    """A network that predicts the next frames of a video, at any frame size.

    Its methods raise ValueError for frames and static channels that are not its configuration's.

    Examples:
        >>> config = crevnet.MODELS["unet"].config(channels=1, static=(), past=4, horizon=2)
        >>> model = crevnet.make_network(config)
        >>> model.generate(torch.rand(1, 4, 1, 32, 32)).shape
        torch.Size([1, 2, 1, 32, 32])
    """

    channels_last: torch.memory_format = torch.channels_last
    """The layout of its convolutions that tensor cores work in."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def forward(self, frames: Tensor, static: Tensor | None = None) -> Tensor:
        """The predictions that the model is trained on, of `frames` (B, T, C, H, W) and `static` (B, S, H, W)."""

    @abstractmethod
    def loss(
        self,
        frames: Tensor,
        static: Tensor | None = None,
        over: Loss = "all",
        fed: Sequence[bool] | None = None,
    ) -> Tensor:
        """The training loss, a scalar, within a window of past and future frames (B, past + horizon, C, H, W).

        over: "all" of the model's predictions; those of the last `horizon` frames alone, "future"; or that of one of these, by
            its number, 1 being the first.
        fed: which of the future frames are fed as they are, one entry for each but the last; where it is false, the
            prediction is fed instead. All are fed if not given.
        """

    @abstractmethod
    def generate(self, past: Tensor, static: Tensor | None = None, horizon: int | None = None) -> Tensor:
        """The frames after `past` (B, T, C, H, W): (B, horizon, C, H, W), not clipped. The configuration's horizon if not
        given."""

    def check_generation(self, height: int, width: int) -> None:
        """Raises ValueError where frames of that size cannot be generated in a reasonable time, with the reason."""

    def scores(self, frames: Tensor, static: Tensor | None = None, number: int | None = None) -> Tensor:
        """What checkpoints are compared by, in the mean, of windows as `loss` takes them; the lower, the better: the mean
        squared error of each generated frame, clipped to [0, 1], (horizon,); or (1,), of the one of that number alone, 1 being
        the first."""
        past = self.config.past
        chosen = slice(number and number - 1, number)
        forecast = self.generate(frames[:, :past], static, number)[:, chosen].clamp(0, 1)
        return F.mse_loss(forecast, frames[:, past:][:, chosen], reduction="none").mean((0, 2, 3, 4))

    def compile_parts(self, **options: Any) -> None:
        """Compile what takes the time, in place, by `torch.compile(..., **options)`. The keys of the model's state stay."""
        for child in self.children():
            for part in child if isinstance(child, nn.ModuleList) else (child,):
                part.compile(**options)

    def _check(self, frames: Tensor, static: Tensor | None, at_least: int = 1) -> None:
        check_window(frames, static, self.config.channels, self.config.static_channels, at_least)

    def _horizon(self, horizon: int | None) -> int:
        if horizon is None:
            return self.config.horizon
        check_at_least_one("horizon", horizon)
        return horizon

    def _chosen(self, over: Loss, predictions: int) -> range:
        """Which of so many predictions, of which the last `horizon` are future ones, a loss is taken over."""
        self.config.check_loss(over)
        future = predictions - self.config.horizon
        if isinstance(over, int):
            return range(future + over - 1, future + over)
        return range(future if over == "future" else 0, predictions)

    def _truly_fed(self, frames: int, fed: Sequence[bool] | None) -> list[bool]:
        """For each frame of a window but the last, whether it is fed as it is."""
        if fed is not None and not self.config.feeds_back:
            raise ValueError(f"{self.config.title} feeds nothing back, so that fed makes no sense")
        future = frames - 1 - self.config.past
        if fed is not None and len(fed) != future:
            raise ValueError(f"fed has to have {future} entries for {frames} frames; got {len(fed)}")
        return [True] * (frames - 1) if fed is None else [True] * self.config.past + list(fed)
