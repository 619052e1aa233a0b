"""The shapes that every video model is given, CrevNet and the baselines alike, and what all do with frames.

Shapes: B batch, T frames, C data channels, S static ones, H x W a frame's height and width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def check_window(frames: Tensor, static: Tensor | None, channels: int, static_channels: int, at_least: int = 1) -> None:
    """Raises ValueError unless `frames` are (B, T, channels, H, W) with T `at_least` so many, and `static` is
    (B, static_channels, H, W), or None where a model has no static channels."""
    if frames.dim() != 5 or frames.shape[2] != channels:
        raise ValueError(
            f"frames have to be (batch, time, {channels} channels, height, width); got {tuple(frames.shape)}"
        )
    if frames.shape[1] < at_least:
        raise ValueError(f"frames have to be at least {at_least} in time; got {frames.shape[1]}")
    if (static is not None) != bool(static_channels):
        raise ValueError(
            f"this model takes {static_channels} static channels: pass static="
            if static_channels
            else "this model takes no static channels"
        )
    expected = (frames.shape[0], static_channels, *frames.shape[-2:])
    if static is not None and static.shape != expected:
        raise ValueError(f"static has to be {expected} for these frames; got {tuple(static.shape)}")


def with_static(frame: Tensor, static: Tensor | None) -> Tensor:
    """(..., C, H, W), (..., S, H, W) -> the static channels behind the others, where there are any."""
    return frame if static is None else torch.cat((frame, static), -3)


def padded(frame: Tensor, multiple: int) -> Tensor:
    """(..., H, W) -> zeros at the bottom and the right, up to multiples of `multiple`."""
    height, width = frame.shape[-2:]
    return F.pad(frame, (0, -width % multiple, 0, -height % multiple))


def cropped(frame: Tensor, like: Tensor) -> Tensor:
    """The part of a padded frame that is inside of `like`."""
    return frame[..., : like.shape[-2], : like.shape[-1]]


def mean_squared_error(predictions: Tensor, truth: Tensor) -> Tensor:
    """A scalar."""
    # PyTorch's result is a scalar in a buffer that is as large as the predictions; a copy is not.
    return F.mse_loss(predictions, truth).clone()
