"""The interface of all video models, CrevNet and the baselines, by which training and scoring treat them alike.

Shapes: B batch, T frames, C data channels, S static channels, H x W height and width of a frame. Values are in [0, 1].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crevnet.networks.config import Loss, ModelConfig, check_at_least_one
from crevnet.networks.shapes import check_window

Config = TypeVar("Config", bound=ModelConfig)


class VideoModel(nn.Module, ABC, Generic[Config]):
    """The base class of all models. A model is a network that predicts the next frames of a video. Frames may have any size.

    The methods raise a ValueError if the frames or static channels do not match the configuration.

    Examples:
        >>> config = crevnet.MODELS["unet"].config(channels=1, static=(), past=4, horizon=2)
        >>> model = crevnet.make_network(config)
        >>> model.generate(torch.rand(1, 4, 1, 32, 32)).shape
        torch.Size([1, 2, 1, 32, 32])
    """

    channels_last: torch.memory_format = torch.channels_last
    """The memory format that tensor cores require for the model's convolutions."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def forward(self, frames: Tensor, static: Tensor | None = None) -> Tensor:
        """Return the predictions from which the training loss is computed.

        Args:
            frames: input frames (B, T, C, H, W).
            static: static channels (B, S, H, W), if the configuration includes any.
        """

    @abstractmethod
    def loss(
        self,
        frames: Tensor,
        static: Tensor | None = None,
        over: Loss = "all",
        fed: Sequence[bool] | None = None,
    ) -> Tensor:
        """Return the scalar training loss for windows of past and future frames.

        Args:
            frames: windows of frames (B, past + horizon, C, H, W).
            static: static channels (B, S, H, W), if the configuration includes any.
            over: predictions over which the loss is computed: "all", "future" (only the last `horizon` frames), or the number of
                a single future frame, counted from 1.
            fed: for each future frame except the last, whether the true frame is the input to the next time step. If an entry is
                false, the predicted frame is used instead. By default, all entries are true.
        """

    @abstractmethod
    def generate(self, past: Tensor, static: Tensor | None = None, horizon: int | None = None) -> Tensor:
        """Predict the frames that follow `past` and return them as a tensor (B, horizon, C, H, W). The values are not clipped.

        Args:
            past: input frames (B, T, C, H, W).
            static: static channels (B, S, H, W), if the configuration includes any.
            horizon: number of frames to predict; by default, `config.horizon`.
        """

    def check_generation(self, height: int, width: int) -> None:
        """Raise a ValueError that states the reason if generating frames of this size would take unreasonably long."""

    def scores(self, frames: Tensor, static: Tensor | None = None, number: int | None = None) -> Tensor:
        """Return one validation score per future frame, for windows of the same form as those passed to `loss`.

        Lower scores are better. Each score is the mean squared error of one generated frame, with values clipped to [0, 1].
        Checkpoints are selected by the mean of these scores. The result has the shape (horizon,). If `number` is given, the
        result has the shape (1,) and contains only the score of the future frame with this number, counted from 1.
        """
        past = self.config.past
        chosen = slice(number and number - 1, number)
        forecast = self.generate(frames[:, :past], static, number)[:, chosen].clamp(0, 1)
        return F.mse_loss(forecast, frames[:, past:][:, chosen], reduction="none").mean((0, 2, 3, 4))

    def compile_parts(self, **options: Any) -> None:
        """Compile the expensive parts in place with `torch.compile(..., **options)`. The state dict keys do not change."""
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
        """The indices of the predictions that a loss covers; the last `horizon` predictions are future frames."""
        self.config.check_loss(over)
        future = predictions - self.config.horizon
        if isinstance(over, int):
            return range(future + over - 1, future + over)
        return range(future if over == "future" else 0, predictions)

    def _truly_fed(self, frames: int, fed: Sequence[bool] | None) -> list[bool]:
        """For each frame of a window but the last, whether the true frame is an input."""
        if fed is not None and not self.config.feeds_back:
            raise ValueError(f"fed is given, but {self.config.title} does not feed predictions back: omit it")
        future = frames - 1 - self.config.past
        if fed is not None and len(fed) != future:
            raise ValueError(f"fed must have {future} entries for {frames} frames; got {len(fed)}")
        return [True] * (frames - 1) if fed is None else [True] * self.config.past + list(fed)


class Model(NamedTuple):
    """A model's configuration class and network class. Each model's file has one as `MODEL`."""

    config: type[ModelConfig]
    network: type[VideoModel[Any]]
