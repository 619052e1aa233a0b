"""Shape checks and frame operations that all video models share, CrevNet and the baselines.

Shapes: B batch, T frames, C data channels, S static channels, H x W height and width of a frame.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def check_window(frames: Tensor, static: Tensor | None, channels: int, static_channels: int, at_least: int = 1) -> None:
    """Raise ValueError unless `frames` are (B, T, channels, H, W) with T at least `at_least`, and `static` matches them.

    `static` must be (B, static_channels, H, W), or None if the model has no static channels.
    """
    if frames.dim() != 5 or frames.shape[2] != channels:
        raise ValueError(f"frames must be (batch, time, {channels} channels, height, width); got {tuple(frames.shape)}")
    if frames.shape[1] < at_least:
        raise ValueError(f"frames must have at least {at_least} time steps; got {frames.shape[1]}")
    if (static is not None) != bool(static_channels):
        raise ValueError(
            f"static is missing, but this model has {static_channels} static channels: pass static="
            if static_channels
            else "static is given, but this model has no static channels: omit it"
        )
    expected = (frames.shape[0], static_channels, *frames.shape[-2:])
    if static is not None and static.shape != expected:
        raise ValueError(f"static must be {expected} for these frames; got {tuple(static.shape)}")


def with_static(frame: Tensor, static: Tensor | None) -> Tensor:
    """`frame` (..., C, H, W) with the static channels (..., S, H, W), if any, appended: (..., C + S, H, W)."""
    return frame if static is None else torch.cat((frame, static), -3)


def padded(frame: Tensor, multiple: int) -> Tensor:
    """`frame` (..., H, W) padded with zeros at the bottom and the right to multiples of `multiple`."""
    height, width = frame.shape[-2:]
    return F.pad(frame, (0, -width % multiple, 0, -height % multiple))


def cropped(frame: Tensor, like: Tensor) -> Tensor:
    """A padded frame, cropped to the height and width of `like`."""
    return frame[..., : like.shape[-2], : like.shape[-1]]


def mean_squared_error(predictions: Tensor, truth: Tensor) -> Tensor:
    """The mean squared error, a scalar."""
    # PyTorch's result is a scalar in a buffer as large as the predictions; the clone releases that buffer.
    return F.mse_loss(predictions, truth).clone()
