"""Scores of forecasts: MSE, MAE, PSNR and SSIM, each by channel and by horizon, and the MSE over the roads alone.

Values are in [0, 1] (values / 255), forecasts are clipped to that. A mean is over windows, horizons and channels alike.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crevnet.evaluation.forecasts import Forecast, Window
from crevnet.evaluation.metrics import MEASURES, measure
from crevnet.networks.config import Feedback, ModelConfig
from crevnet.networks.video_model import VideoModel

StaticOf = Callable[[ModelConfig, Window], Tensor | None]

ENSEMBLE = "mean of the runs"


@dataclass(frozen=True)
class Scores:
    """One forecast's scores over all windows; `crevnet.evaluation.metrics` says how each is taken."""

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
    """Over the pixels where the road map is positive."""
    mse_summed: float
    """Squared errors summed over a frame's values, in the mean over frames: what papers on Moving MNIST call MSE."""


class Scoring:
    """Adds up measures window by window, in float64."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._windows = self._frame_values = 0
        self._on_roads = 0.0
        self._road_values = 0

    def add(self, forecast: Tensor, truth: Tensor, roads: Tensor) -> None:
        """forecast and truth (B, horizon, C, H, W); roads (B, 1, H, W), positive on roads."""
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
            raise ValueError("no window was scored")
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
    """Score every forecast on the same windows: batches with "frames" (B, past + horizon, C, H, W), "road_map" (B, 1, H, W),
    and what the forecasts need.

    horizons: which of the future frames to score, 1 being the first; all if not given.
    ensemble: names of forecasts whose mean, of what they gave before it was clipped, is scored beside them.
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
    """Each batch, the truth in it and what every forecast says, (B, frames, C, H, W); arguments as in `score`."""
    chosen = slice(None) if horizons is None else [horizon - 1 for horizon in horizons]
    for batch in batches:
        seen, truth = batch["frames"][:, :past], batch["frames"][:, past:]
        found = {name: forecast(seen, batch)[:, chosen] for name, forecast in forecasts.items()}
        yield batch, truth[:, chosen], found


class NetworkForecast:
    """A trained network as a forecast from the last frames, as many as it has been trained on.

    Args:
        static_of: the static channels (B, S, H, W) that a model sees beside a batch of windows, or None.
        feedback: what CrevNet feeds back, latents if not given; other models feed back frames.
        horizon: frames to forecast, those that it has been trained for if not given.
    """

    def __init__(
        self,
        network: VideoModel[Any],
        static_of: StaticOf,
        feedback: Feedback | None = None,
        horizon: int | None = None,
    ) -> None:
        self._network = network.eval()
        self._static_of, self._horizon = static_of, horizon
        self._options = {} if feedback is None else {"feedback": feedback}

    def __call__(self, past: Tensor, window: Window) -> Tensor:
        config, device = self._network.config, next(self._network.parameters()).device
        static = self._static_of(config, window)
        seen = past[:, -config.past :].to(device)
        static = None if static is None else static.to(device)
        return self._network.generate(seen, static, self._horizon, **self._options).to(past)


def mean_over_cities(by_city: Mapping[str, Mapping[str, Scores]]) -> dict[str, Scores]:
    """The mean over cities, as in the competition."""
    cities = list(by_city.values())
    return {name: _mean([city[name] for city in cities]) for name in cities[0]}


def _mean(scores: Sequence[Scores]) -> Scores:
    means = {f.name: np.mean([getattr(s, f.name) for s in scores], axis=0).tolist() for f in fields(Scores)}
    return Scores(**{name: tuple(mean) if isinstance(mean, list) else mean for name, mean in means.items()})
