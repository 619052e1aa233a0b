"""Scores of forecasts: MSE, MAE, PSNR and SSIM, each also by channel and by horizon, and the MSE over only the roads.

Values are in [0, 1] (values / 255), and forecasts are clipped to that range. A mean weights windows, horizons and channels
equally.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crevnet.evaluation.forecasts import Forecast, Window
from crevnet.evaluation.metrics import MEASURES, measure

ENSEMBLE = "mean of the runs"


@dataclass(frozen=True)
class Scores:
    """One forecast's scores over all windows, as defined in `crevnet.evaluation.metrics`."""

    mse: float
    mse_by_channel: tuple[float, ...]
    mse_by_horizon: tuple[float, ...]
    mae: float
    mae_by_channel: tuple[float, ...]
    mae_by_horizon: tuple[float, ...]
    psnr: float
    psnr_by_channel: tuple[float, ...]
    psnr_by_horizon: tuple[float, ...]
    ssim: float
    ssim_by_channel: tuple[float, ...]
    ssim_by_horizon: tuple[float, ...]
    mse_on_roads: float
    """MSE over the pixels with a positive road map."""
    mse_summed: float
    """Squared errors summed over a frame's values and averaged over frames: the MSE of papers on Moving MNIST."""


class Scoring:
    """Accumulates measures window by window, in float64."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._windows = self._frame_values = 0
        self._on_roads = 0.0
        self._road_values = 0

    def add(self, forecast: Tensor, truth: Tensor, roads: Tensor) -> None:
        """Add a batch: `forecast` and `truth` are (B, horizon, C, H, W); `roads` is (B, 1, H, W), positive on roads."""
        for window_forecast, window_truth, window_roads in zip(forecast.clamp(0, 1), truth, roads, strict=True):
            found = measure(window_forecast, window_truth).cpu()
            self._sums = found if self._sums is None else self._sums + found
            self._windows += 1
            self._frame_values = window_truth[0].numel()
            on_road = window_roads[0] > 0
            error = window_forecast[..., on_road].double() - window_truth[..., on_road].double()
            self._on_roads += error.square().sum().item()
            self._road_values += error.numel()

    def scores(self) -> Scores:
        if self._sums is None:
            raise ValueError("no window was scored; expected at least one call of `add`")
        values: dict[str, Any] = {}
        for name, by_horizon_and_channel in zip(MEASURES, self._sums / self._windows, strict=True):
            values[name] = by_horizon_and_channel.mean().item()
            values[f"{name}_by_channel"] = tuple(by_horizon_and_channel.mean(0).tolist())
            values[f"{name}_by_horizon"] = tuple(by_horizon_and_channel.mean(1).tolist())
        values["mse_summed"] = values["mse"] * self._frame_values
        return Scores(**values, mse_on_roads=self._on_roads / max(self._road_values, 1))


def score(
    forecasts: Mapping[str, Forecast],
    batches: Iterable[Mapping[str, Any]],
    past: int,
    horizons: Sequence[int] | None = None,
    ensemble: Sequence[str] = (),
) -> dict[str, Scores]:
    """Score every forecast on the same windows.

    Args:
        forecasts: forecasts by name.
        batches: batches with "frames" (B, past + horizon, C, H, W), "road_map" (B, 1, H, W), and other inputs of the forecasts.
        past: number of input frames.
        horizons: the future frames to score, 1 being the first; all by default.
        ensemble: names of forecasts whose mean, before clipping, is also scored.
    """
    scorings: dict[str, Scoring] = defaultdict(Scoring)
    for batch, truth, found in predictions(forecasts, batches, past, horizons):
        if ensemble:
            members = {name: found[name] for name in ensemble}
            found = {**members, ENSEMBLE: torch.stack(list(members.values())).mean(0), **found}
        for name, predicted in found.items():
            scorings[name].add(predicted, truth, batch["road_map"])
    return {name: scoring.scores() for name, scoring in scorings.items()}


def predictions(
    forecasts: Mapping[str, Forecast],
    batches: Iterable[Window],
    past: int,
    horizons: Sequence[int] | None = None,
) -> Iterator[tuple[Window, Tensor, dict[str, Tensor]]]:
    """Each batch, its true frames and every forecast's frames, (B, frames, C, H, W). The arguments are those of `score`."""
    chosen = slice(None) if horizons is None else [horizon - 1 for horizon in horizons]
    for batch in batches:
        seen, truth = batch["frames"][:, :past], batch["frames"][:, past:]
        found = {name: forecast(seen, batch)[:, chosen] for name, forecast in forecasts.items()}
        yield batch, truth[:, chosen], found


def mean_over_cities(by_city: Mapping[str, Mapping[str, Scores]]) -> dict[str, Scores]:
    """The mean over cities, as in the competition."""
    cities = list(by_city.values())
    return {name: _mean([city[name] for city in cities]) for name in cities[0]}


def _mean(scores: Sequence[Scores]) -> Scores:
    means = {f.name: np.mean([getattr(s, f.name) for s in scores], axis=0).tolist() for f in fields(Scores)}
    values: dict[str, Any] = {name: tuple(mean) if isinstance(mean, list) else mean for name, mean in means.items()}
    return Scores(**values)
