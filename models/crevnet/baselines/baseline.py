"""What every baseline is given and what it gives, so that benchmarks and training treat all of them alike.

Shapes: B batch, T frames, C data channels, H x W a frame's height and width; Ci channels that a model sees, the static ones
among them. Values in [0, 1].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crevnet.shapes import check_window


@dataclass(frozen=True)
class Task:
    """What a baseline is to predict, and from what.

    Args:
        channels: data channels of a frame (Traffic4cast 2019: volume, speed, heading).
        static_channels: channels of the input that stay as they are within a window, a road map say. They are never predicted.
        past: frames seen.
        horizon: frames predicted.
        patch: the model works on frames of H/patch x W/patch pixels, each the channels of patch x patch pixels.
    """

    channels: int = 3
    static_channels: int = 0
    past: int = 9
    horizon: int = 3
    patch: int = 1

    def __post_init__(self) -> None:
        for name in ("channels", "past", "horizon", "patch"):
            check_at_least_one(name, getattr(self, name))
        if self.static_channels < 0:
            raise ValueError(f"static_channels cannot be negative; got {self.static_channels}")

    @property
    def input_channels(self) -> int:
        """Channels of a frame with the static ones, Ci."""
        return self.channels + self.static_channels


class Baseline(nn.Module, ABC):
    """A network that predicts the next frames of a video, at any frame size.

    Raises ValueError for a task with patches where the model has none, and in its methods for frames and static channels that
    are not the task's.
    """

    takes_patches: ClassVar[bool] = False

    def __init__(self, task: Task) -> None:
        super().__init__()
        if task.patch != 1 and not self.takes_patches:
            raise ValueError(
                f"patch has to be 1 for {type(self).__name__}, which works on single pixels; got {task.patch}"
            )
        self.task = task

    @abstractmethod
    def forward(self, frames: Tensor, static: Tensor | None = None) -> Tensor:
        """The predictions that the model is trained on, of `frames` (B, T, C, H, W) and `static` (B, S, H, W)."""

    @abstractmethod
    def loss(self, frames: Tensor, static: Tensor | None = None) -> Tensor:
        """The training loss, a scalar, within a window of past and future frames (B, past + horizon, C, H, W)."""

    @abstractmethod
    def generate(self, past: Tensor, static: Tensor | None = None, horizon: int | None = None) -> Tensor:
        """The frames after `past` (B, T, C, H, W): (B, horizon, C, H, W), not clipped. The task's horizon if not given."""

    def _check(self, frames: Tensor, static: Tensor | None, at_least: int = 1) -> None:
        check_window(frames, static, self.task.channels, self.task.static_channels, at_least)

    def _horizon(self, horizon: int | None) -> int:
        if horizon is None:
            return self.task.horizon
        check_at_least_one("horizon", horizon)
        return horizon


def check_at_least_one(name: str, value: int) -> None:
    """Raises ValueError where an argument that counts something is not positive."""
    if value < 1:
        raise ValueError(f"{name} has to be at least 1, not {value}")


def with_static(frame: Tensor, static: Tensor | None) -> Tensor:
    """(B, N, H, W), (B, S, H, W) -> the static channels behind the others, where there are any."""
    return frame if static is None else torch.cat((frame, static), 1)


def padded(frame: Tensor, multiple: int) -> Tensor:
    """(B, N, H, W) -> zeros at the bottom and the right, up to multiples of `multiple`."""
    height, width = frame.shape[-2:]
    return F.pad(frame, (0, -width % multiple, 0, -height % multiple))


def cropped(frame: Tensor, like: Tensor) -> Tensor:
    """The part of a padded frame that is inside of `like`."""
    return frame[..., : like.shape[-2], : like.shape[-1]]


def mean_squared_error(predictions: Tensor, truth: Tensor) -> Tensor:
    """A scalar."""
    # PyTorch's result is a scalar in a buffer that is as large as the predictions; a copy is not.
    return F.mse_loss(predictions, truth).clone()
