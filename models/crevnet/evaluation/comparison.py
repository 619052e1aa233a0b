"""Scores of trained runs and naive baselines on the same windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device

from crevnet.data.city_data import CityData
from crevnet.data.errors import DataError
from crevnet.data.files.layouts import Layout
from crevnet.data.maps.slot_means import slot_means
from crevnet.data.settings import DataSettings
from crevnet.evaluation import forecasts
from crevnet.evaluation.forecasts import Forecast
from crevnet.evaluation.network_forecast import NetworkForecast
from crevnet.evaluation.scores import Scores, score
from crevnet.networks.config import CrevNetConfig, Feedback, ModelConfig
from crevnet.networks.video_model import VideoModel
from crevnet.training.checkpoint_reading import load_network
from crevnet.training.settings import load_settings


@dataclass(frozen=True)
class Comparison:
    """Scores of each city's forecasts, and the windows that they measure.

    Attributes:
        by_city: city -> name of a forecast -> its scores.
        layout: the meaning of channels and slots.
        windows: number of windows, over all cities.
        channels: number of channels of a frame.
        past, horizon: number of input frames and of predicted frames in each window.
        horizons: the predicted frames that are scored, 1 being the first.
    """

    by_city: dict[str, dict[str, Scores]]
    layout: Layout
    windows: int
    channels: int
    past: int
    horizon: int
    horizons: tuple[int, ...]


def compare(
    runs: Sequence[Path], data: DataSettings, checkpoint: str, feedback: Feedback | None, ensemble: bool
) -> Comparison:
    """Score the runs and the naive baselines on the validation windows of `data`.

    Windows have the largest number of past frames among the models; each model gets the last ones. Raises DataError if the runs
    do not predict the same frames.
    """
    models = {run: load_settings(run).model for run in runs}
    wanted = common_model(models)
    cities = CityData(data, wanted)
    networks = {
        model.title if len(runs) == 1 else f"{model.title}, {run}": trained(run, checkpoint, feedback, cities)
        for run, model in models.items()
    }
    others = untrained(cities, data, wanted.horizon)
    horizons = cities.layout.horizons(wanted.horizon)
    by_city: dict[str, dict[str, Scores]] = {}
    windows = 0
    for city in sorted({day.city for day in cities.validation_days}):
        batches = cities.validation_batches(city)
        windows += len(batches.dataset)  # type: ignore[arg-type]
        with torch.inference_mode():
            there = (move_data_to_device(batch, device()) for batch in batches)
            members = list(networks) if ensemble else []
            by_city[city] = score({**networks, **others[city]}, there, wanted.past, horizons, members)
    return Comparison(by_city, cities.layout, windows, wanted.channels, wanted.past, wanted.horizon, horizons)


def untrained(cities: CityData, data: DataSettings, horizon: int) -> dict[str, dict[str, Forecast]]:
    """City -> name -> naive baseline, which forecasts without training."""
    means = forecasts.pixel_means(cities.training_days, data.training_slots)
    alike: dict[str, Forecast] = {
        "zeros": forecasts.zeros(horizon),
        "last frame": forecasts.last_frame(horizon),
        "mean of last three": forecasts.mean_of_three(horizon),
    }
    by_slot = {}
    if cities.layout.dated:
        of_slots = slot_means(cities.training_days, data.training_slots)
        by_slot = {"mean of the slot": forecasts.slot_mean(of_slots, horizon)}
    return {
        city: {**alike, "mean of training days": forecasts.training_mean(mean, horizon), **by_slot}
        for city, mean in means.items()
    }


def common_model(models: Mapping[Path, ModelConfig]) -> ModelConfig:
    """The configuration of the model with the longest past, with all static inputs of any model."""
    (first, model), *others = models.items()
    for run, other in others:
        if (other.channels, other.horizon) != (model.channels, model.horizon):
            raise DataError(
                f"{run} predicts {other.horizon} frames of {other.channels} channels, but {first} predicts {model.horizon} "
                f"of {model.channels}: evaluate the runs separately"
            )
    static = dict.fromkeys(name for model in models.values() for name in model.static)
    return replace(max(models.values(), key=lambda model: model.past), static=tuple(static))


def trained(run: Path, checkpoint: str, feedback: Feedback | None, cities: CityData) -> NetworkForecast:
    """The run's network, on the GPU if there is one. Raises DataError if it cannot forecast as requested."""
    model = load_settings(run).model
    network = load_network(run, model, checkpoint)
    check_forecasts(run, network, feedback, cities.validation_days[0].shape)
    return NetworkForecast(network.to(device()), cities.static_of, feedback)


def check_forecasts(
    run: Path, network: VideoModel[Any], feedback: Feedback | None, shape: tuple[int, int, int, int]
) -> None:
    """Raise DataError if a run's network cannot forecast days of this `shape` (slots, H, W, C) with this `feedback`."""
    if feedback is not None and not isinstance(network.config, CrevNetConfig):
        raise DataError(
            f"--feedback {feedback} is only for CrevNet, but {run} is a run of {network.config.title}: omit the option"
        )
    try:
        network.check_generation(*shape[1:3])
    except ValueError as error:
        raise DataError(f"{run}: {error}; see TensorBoard for its loss on the validation days") from error


def device() -> torch.device:
    """The device for forecasts and scores: the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
