"""Scores of forecasts: the competition's MSE and MAE, by channel, by horizon and over the roads alone.

Values are in [0, 1] (values / 255), forecasts are clipped to that. A mean is over windows, horizons, channels and pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from crevnet.forecasts import Forecast, Window
from crevnet.network import CrevNet, Feedback


@dataclass(frozen=True)
class Scores:
    """One forecast's errors over all windows."""

    mse: float
    mae: float
    mse_by_channel: tuple[float, ...]
    mse_by_horizon: tuple[float, ...]
    mse_on_roads: float
    """Over the pixels where the road map is positive."""


class Scoring:
    """Adds up errors window by window, in float64."""

    def __init__(self) -> None:
        self._squared: Tensor | None = None
        self._absolute = 0.0
        self._on_roads = 0.0
        self._values = 0
        self._road_values = 0.0

    def add(self, forecast: Tensor, truth: Tensor, roads: Tensor) -> None:
        """forecast and truth (B, horizon, C, H, W); roads (B, 1, H, W), positive on roads."""
        error = forecast.clamp(0, 1).double() - truth.double()
        squared = error.square()
        by_horizon_and_channel = squared.sum((0, 3, 4)).cpu()
        self._squared = by_horizon_and_channel + (0 if self._squared is None else self._squared)
        self._absolute += error.abs().sum().item()
        on_road = (roads > 0)[:, None].expand_as(squared)
        self._on_roads += squared[on_road].sum().item()
        self._road_values += on_road.sum().item()
        self._values += squared.numel()

    def scores(self) -> Scores:
        if self._squared is None:
            raise ValueError("no window was scored")
        horizons, channels = self._squared.shape
        return Scores(
            mse=self._squared.sum().item() / self._values,
            mae=self._absolute / self._values,
            mse_by_channel=tuple((self._squared.sum(0) / (self._values / channels)).tolist()),
            mse_by_horizon=tuple((self._squared.sum(1) / (self._values / horizons)).tolist()),
            mse_on_roads=self._on_roads / max(self._road_values, 1),
        )


def score(
    forecasts: Mapping[str, Forecast],
    batches: Iterable[Mapping[str, Any]],
    past: int,
    horizons: Sequence[int] | None = None,
) -> dict[str, Scores]:
    """Score every forecast on the same windows: batches with "frames" (B, past + horizon, C, H, W), "road_map" (B, 1, H, W),
    and what the forecasts need: "static" (B, S, H, W) for networks.

    horizons: which of the future frames to score, 1 being the first; all if not given.
    """
    scored = slice(None) if horizons is None else [horizon - 1 for horizon in horizons]
    scorings = {name: Scoring() for name in forecasts}
    for batch in batches:
        seen, truth = batch["frames"][:, :past], batch["frames"][:, past:]
        for name, forecast in forecasts.items():
            scorings[name].add(forecast(seen, batch)[:, scored], truth[:, scored], batch["road_map"])
    return {name: scoring.scores() for name, scoring in scorings.items()}


class CrevNetForecast:
    """A trained network as a forecast."""

    def __init__(self, model: CrevNet, feedback: Feedback) -> None:
        self._model = model.eval()
        self._feedback = feedback

    def __call__(self, past: Tensor, window: Window) -> Tensor:
        device = next(self._model.parameters()).device
        static = window["static"].to(device) if self._model.config.static else None
        return self._model.generate(past.to(device), static, feedback=self._feedback).to(past.device)


def mean_over_cities(by_city: Mapping[str, Mapping[str, Scores]]) -> dict[str, Scores]:
    """The mean over cities, as in the competition."""
    cities = list(by_city.values())
    return {
        name: Scores(
            mse=_mean(c[name].mse for c in cities),
            mae=_mean(c[name].mae for c in cities),
            mse_by_channel=_means(c[name].mse_by_channel for c in cities),
            mse_by_horizon=_means(c[name].mse_by_horizon for c in cities),
            mse_on_roads=_mean(c[name].mse_on_roads for c in cities),
        )
        for name in cities[0]
    }


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return sum(known) / len(known)


def _means(rows: Iterable[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(_mean(column) for column in zip(*rows, strict=True))
