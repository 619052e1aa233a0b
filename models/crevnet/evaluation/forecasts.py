"""Naive baselines, with which a model is compared.

Each maps past frames (B, T, C, H, W) and the batch of their windows to a forecast (B, horizon, C, H, W).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from crevnet.data.files.days import DayFile, sample_frames, unit_interval
from crevnet.data.maps.slot_means import SlotMeans

Window = Mapping[str, Any]
"""A batch of windows: the collated items of Windows."""
Forecast = Callable[[Tensor, Window], Tensor]


def zeros(horizon: int) -> Forecast:
    """Zeros, that is, no data anywhere."""
    return lambda past, _: past.new_zeros(past.shape[0], horizon, *past.shape[2:])


def last_frame(horizon: int) -> Forecast:
    """The last input frame, repeated."""
    return lambda past, _: _repeated(past[:, -1], horizon)


def mean_of_three(horizon: int) -> Forecast:
    """The mean of the last three frames, repeated: the organizers' baseline."""
    return lambda past, _: _repeated(past[:, -3:].mean(1), horizon)


def training_mean(mean: Tensor, horizon: int) -> Forecast:
    """A constant `mean` (C, H, W), each pixel's mean over the training days."""
    return lambda past, _: _repeated(mean.to(past).expand(past.shape[0], -1, -1, -1), horizon)


def slot_mean(means: Mapping[str, SlotMeans], horizon: int) -> Forecast:
    """The historical mean of the city at the predicted time of day. Windows must contain "city" and "start"."""

    def forecast(past: Tensor, window: Window) -> Tensor:
        first = [int(start) + past.shape[1] for start in window["start"]]
        frames = [means[city].frames(slot, horizon) for city, slot in zip(window["city"], first, strict=True)]
        return torch.stack(frames).to(past)

    return forecast


def by_frame(forecasts: Mapping[int, Forecast]) -> Forecast:
    """Combines forecasts: frame n is that of forecast n, 1 being the first. Frames without a forecast are NaN."""

    def forecast(past: Tensor, window: Window) -> Tensor:
        joined = past.new_full((past.shape[0], max(forecasts), *past.shape[2:]), torch.nan)
        for number, of_frame in forecasts.items():
            joined[:, number - 1] = of_frame(past, window)[:, number - 1]
        return joined

    return forecast


def pixel_means(days: Sequence[DayFile], slots: tuple[int, int] | None = None, frames: int = 1200) -> dict[str, Tensor]:
    """City -> mean frame, float32 (C, H, W) in [0, 1], over at most `frames` frames spread evenly over its days and slots."""
    means = {}
    for city in sorted({day.city for day in days}):
        chosen = [day for day in days if day.city == city]
        total, count = torch.zeros(()), 0
        for frame in sample_frames(chosen, slots, frames):
            total = total + unit_interval(torch.from_numpy(frame))
            count += 1
        means[city] = (total / count).permute(2, 0, 1)
    return means


def _repeated(frame: Tensor, horizon: int) -> Tensor:
    return frame[:, None].expand(-1, horizon, *frame.shape[1:])
