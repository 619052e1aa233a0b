"""Where and when forecasts err: squared errors of each pixel, of each horizon and of each hour of the day."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from numpy.typing import NDArray
from torch import Tensor

from crevnet.data.city_data import CityData
from crevnet.data.settings import DataSettings
from crevnet.evaluation.comparison import device, trained, untrained
from crevnet.evaluation.forecasts import Forecast
from crevnet.evaluation.scores import predictions
from crevnet.networks.config import Feedback
from crevnet.training.settings import load_settings

_SLOTS_AN_HOUR = 12


class ErrorSums:
    """Adds up squared errors window by window, in float64: beside the sums, memory for one window. Forecasts are clipped to
    [0, 1]."""

    def __init__(self) -> None:
        self._pixels: Tensor | None = None
        self._frames = 0
        self._sums: NDArray[np.float64] | None = None  # (24, frames)
        self._counts: NDArray[np.int64] | None = None

    def add(self, forecast: Tensor, truth: Tensor, slots: Tensor) -> None:
        """forecast and truth (B, frames, C, H, W); slots (B, frames): when in its day each frame is."""
        for predicted, true, when in zip(forecast, truth, slots, strict=True):
            squares = (predicted.clamp(0, 1).double() - true.double()).square()
            if self._pixels is None or self._sums is None or self._counts is None:
                self._pixels = torch.zeros_like(squares[0])
                self._sums = np.zeros((24, len(squares)))
                self._counts = np.zeros((24, len(squares)), dtype=np.int64)
            self._pixels += squares.sum(0)
            self._frames += len(squares)
            place = (when.cpu().numpy() // _SLOTS_AN_HOUR % 24, np.arange(len(squares)))
            self._sums[place] += squares.mean((1, 2, 3)).cpu().numpy()
            self._counts[place] += 1

    @property
    def by_pixel(self) -> NDArray[np.float64]:
        """The mean squared error of each pixel, (C, H, W)."""
        assert self._pixels is not None, "no window was added"
        return (self._pixels / self._frames).cpu().numpy()

    @property
    def by_horizon(self) -> NDArray[np.float64]:
        """Of each predicted frame, (frames,)."""
        assert self._sums is not None and self._counts is not None, "no window was added"
        return self._sums.sum(0) / self._counts.sum(0)

    @property
    def by_hour(self) -> NDArray[np.float64]:
        """Of the frames predicted in each hour, (24,); nan where there are none."""
        assert self._sums is not None and self._counts is not None, "no window was added"
        counts = self._counts.sum(1)
        return np.divide(self._sums.sum(1), counts, out=np.full(24, np.nan), where=counts > 0)

    @property
    def mse(self) -> float:
        return float(self.by_pixel.mean())


def error_sums(
    run: Path, data: DataSettings, checkpoint: str, feedback: Feedback | None
) -> Iterator[tuple[str, dict[str, ErrorSums]]]:
    """For each city: of the run's model, which comes first, and of the forecasts that need no training, on its validation
    windows."""
    model = load_settings(run).model
    cities = CityData(data, model)
    network = trained(run, checkpoint, feedback, cities)
    horizons = cities.layout.horizons(model.horizon)
    by_city = untrained(cities, data, model.horizon)
    for city in sorted({day.city for day in cities.validation_days}):
        yield city, _sums({model.title: network, **by_city[city]}, cities, city, model.past, horizons)


@torch.inference_mode()
def _sums(
    forecasts: Mapping[str, Forecast], cities: CityData, city: str, past: int, horizons: Sequence[int]
) -> dict[str, ErrorSums]:
    sums = {name: ErrorSums() for name in forecasts}
    later = torch.tensor(horizons) + past - 1
    there = (move_data_to_device(batch, device()) for batch in cities.validation_batches(city))
    for batch, truth, found in predictions(forecasts, there, past, horizons):
        slots = batch["start"].cpu()[:, None] + later
        for name, predicted in found.items():
            sums[name].add(predicted, truth, slots)
    return sums
