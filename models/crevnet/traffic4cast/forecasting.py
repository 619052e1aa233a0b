"""Forecasts of test cases: trained runs, their mean, and naive baselines, in the value range of a submission."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from crevnet.data.city_data import open_training_days
from crevnet.data.errors import DataError
from crevnet.data.files.days import DayFile, DayReader
from crevnet.data.files.layouts import layout_named
from crevnet.data.files.protocol import Protocol
from crevnet.data.maps.static import StaticInputs, static_maps
from crevnet.data.settings import DataSettings
from crevnet.evaluation import forecasts
from crevnet.evaluation.comparison import check_forecasts, device
from crevnet.machine.files import quoted
from crevnet.networks.config import Feedback, Static
from crevnet.traffic4cast.interface import Case
from crevnet.training.checkpoint_reading import load_network
from crevnet.training.recipe_folders import base_run, city_run, frame_run, record
from crevnet.training.settings import load_settings

CaseForecast = Callable[[Case], np.ndarray]
"""Test case -> the scored frames, (P, H, W, C) floating point in the range 0..255, not clipped."""


def submitted(values: np.ndarray) -> np.ndarray:
    """Values in a submission's format: uint8, clipped to 0..255 and rounded half to even, like the organizers' baselines.

    Raises DataError for values that are not finite.
    """
    if not np.isfinite(values).all():
        raise DataError("the forecast is not finite, so it cannot be submitted: train again, at a lower learning rate")
    rounded: np.ndarray = np.rint(values.clip(0, 255)).astype(np.uint8)
    return rounded


def naive_forecasts(asked: Protocol) -> dict[str, CaseForecast]:
    """The naive baselines, which receive the same frames as a submission's model."""
    horizon = asked.horizon
    naive = {
        "zeros": forecasts.zeros(horizon),
        "last frame": forecasts.last_frame(horizon),
        "mean of last three": forecasts.mean_of_three(horizon),
    }
    return {name: partial(_naive_forecast, forecast, asked) for name, forecast in naive.items()}


def _naive_forecast(forecast: forecasts.Forecast, asked: Protocol, case: Case) -> np.ndarray:
    return _asked_for(forecast(_frames(case), {}), asked)


class SlotMean:
    """The historical mean: each pixel's mean over the training days of its city, at the predicted time of day.

    The mean of a slot is computed on first use, from that slot of every day. It is rounded to uint8 and stored.
    """

    def __init__(self, days: Sequence[DayFile], asked: Protocol) -> None:
        self._days, self._asked = days, asked
        self._reader = DayReader()
        self._means: dict[tuple[str, int], np.ndarray] = {}

    def __call__(self, case: Case) -> np.ndarray:
        means = np.stack([self._mean(case.day.city, case.first + horizon - 1) for horizon in self._asked.horizons])
        if means.shape[1:] != case.past.shape[1:]:
            raise DataError(
                f"{case.day.city} has training days of frames {means.shape[1:]} (H, W, C), but {case.day.path} has "
                f"{case.past.shape[1:]}: choose another --data.root"
            )
        return means

    def _mean(self, city: str, slot: int) -> np.ndarray:
        if (city, slot) not in self._means:
            days = [day for day in self._days if day.city == city and slot < day.shape[0]]
            if not days:
                raise DataError(
                    f"{city} has no training day with slot {slot}, which its historical mean requires: use whole days"
                )
            total = sum(self._reader.read(day, slot, slot + 1)[0].astype(np.int64) for day in days)
            self._means[city, slot] = submitted(total / len(days))
        return self._means[city, slot]


class RunForecast:
    """Forecasts of a trained run.

    A model that uses fewer frames than are given receives the last of them. It generates frames up to the farthest scored
    horizon. Maps among its static inputs are loaded as in training, for the cities of `days`.
    """

    def __init__(
        self,
        run: Path,
        data: DataSettings,
        days: Sequence[DayFile],
        checkpoint: str,
        feedback: Feedback | None,
        asked: Protocol,
    ) -> None:
        self._model = load_settings(run).model
        if self._model.channels != len(asked.channels):
            raise DataError(
                f"{run} predicts {self._model.channels} channels, but the competition of {asked.name} requires "
                f"{len(asked.channels)} ({', '.join(asked.channels)}): choose another --data.protocol or another run"
            )
        if self._model.past > asked.past:
            raise DataError(
                f"{run} requires {self._model.past} past frames, but the competition provides {asked.past}: choose another run"
            )
        network = load_network(run, self._model, checkpoint)
        check_forecasts(run, network, feedback, days[0].shape)
        self._network = network.to(device()).eval()
        self._static = _static_inputs(data, days, self._model.static)
        self._options = {} if feedback is None else {"feedback": feedback}
        self._run, self._asked = run, asked

    def __call__(self, case: Case) -> np.ndarray:
        past = _frames(case)[:, -self._model.past :].to(device())
        static = (
            self._static(case.day, case.first - self._model.past)[None].to(device()) if self._model.static else None
        )
        try:
            found = self._network.generate(past, static, self._asked.horizon, **self._options)
        except (RuntimeError, ValueError) as error:  # for unsuitable frame sizes
            raise DataError(f"{self._run} cannot predict {case.day.path}: {' '.join(str(error).split())}") from error
        return _asked_for(found, self._asked)


class RecipeForecast:
    """A recipe's final model: for each city, the mean of the base model, the city's model and its models of single frames."""

    def __init__(self, folder: Path, forecast_of: Callable[[Path], CaseForecast], asked: Protocol) -> None:
        self._folder, self._forecast_of, self._asked = folder, forecast_of, asked
        self._base = forecast_of(base_run(folder))
        self._city: tuple[str, list[CaseForecast]] | None = (
            None  # only one at a time, since a city has a network for each frame
        )

    def __call__(self, case: Case) -> np.ndarray:
        base, tuned, *frames = (forecast(case) for forecast in (self._base, *self._tuned(case.day.city)))
        joined = np.stack([frame[k] for k, frame in enumerate(frames)])
        mean: np.ndarray = np.mean([base, tuned, joined], axis=0)
        return mean

    def _tuned(self, city: str) -> list[CaseForecast]:
        if self._city is None or self._city[0] != city:
            self._city = city, [self._forecast_of(run) for run in city_runs(self._folder, city, self._asked)]
        return self._city[1]


def city_runs(folder: Path, city: str, asked: Protocol) -> list[Path]:
    """A recipe's runs for a city: the city's own, then those of its frames, by horizon. DataError if one is not finished."""
    horizon = load_settings(base_run(folder)).model.horizon
    if horizon != asked.horizon:
        raise DataError(
            f"{folder} is tuned for {horizon} frames, but the competition of {asked.name} requires {asked.horizon}: choose "
            "another recipe, or one of its runs"
        )
    runs = [city_run(folder, city), *(frame_run(folder, city, number) for number in asked.horizons)]
    for run in runs:
        if not record(run).is_file():
            raise DataError(
                f"{run} is not finished: continue with crevnet recipe paper --out {quoted(folder)}, or choose other "
                "--data.cities"
            )
    return runs


def ensemble(members: Sequence[CaseForecast], weights: Sequence[float] | None) -> CaseForecast:
    """The weighted mean of several forecasts, before clipping and rounding; the weights are normalized."""

    def mean(case: Case) -> np.ndarray:
        return np.average([member(case) for member in members], axis=0, weights=weights)

    return mean


def _static_inputs(data: DataSettings, days: Sequence[DayFile], names: Sequence[Static]) -> StaticInputs:
    if not {*names} - {"clock"}:
        return StaticInputs(names, {})
    layout = layout_named(data.protocol, data.heading_order)
    if data.root is None or layout.static_file(data.root, days[0].city) is None:
        days = open_training_days(data)  # the road map is computed from their frames
    assert data.root is not None
    return StaticInputs(names, static_maps(names, layout, data.root, days, data.training_slots))


def _frames(case: Case) -> Tensor:
    """The given frames as float32 (1, 12, C, H, W) in [0, 1]."""
    return torch.from_numpy(case.past).permute(0, 3, 1, 2)[None].to(torch.float32).div_(255)


def _asked_for(forecast: Tensor, asked: Protocol) -> np.ndarray:
    """(1, horizon, C, H, W) in [0, 1] -> (P, H, W, C) in 0..255."""
    frames = forecast[0, [horizon - 1 for horizon in asked.horizons]].permute(0, 2, 3, 1)
    values: np.ndarray = frames.mul(255).cpu().numpy()
    return values
