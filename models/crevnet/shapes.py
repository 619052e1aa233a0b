"""The shapes that every video model is given, CrevNet and the baselines alike."""

from __future__ import annotations

from torch import Tensor


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
