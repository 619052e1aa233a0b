"""The prediction that `predict` and `figures` write."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate

from crevnet import figures
from crevnet.cli.console import console
from crevnet.data.chosen_window import choose_window, default_channel
from crevnet.data.city_data import CityData
from crevnet.data.errors import DataError
from crevnet.data.files.days import DayFile
from crevnet.data.files.hdf5_writing import writing_hdf5
from crevnet.data.files.sealed import seal
from crevnet.evaluation.comparison import trained
from crevnet.machine.files import shown
from crevnet.machine.folders import make_folder
from crevnet.training.settings import load_settings


@dataclass(frozen=True)
class Chosen:
    """The predicted window and the channel in its pictures; None for the defaults."""

    city: str | None = None
    date: str | None = None
    slot: int | None = None
    channel: int | None = None


def write_prediction(options: Any, chosen: Chosen, out: Path) -> None:
    """Write the prediction of the window as HDF5, PNG and GIF.

    options: with `run`, `data`, `checkpoint` and `feedback`.
    """
    model = load_settings(options.run).model
    cities = CityData(options.data, model)
    forecast = trained(options.run, options.checkpoint, options.feedback, cities)
    slots = options.data.validation_slots
    day, slot = choose_window(cities.validation_days, slots, model, chosen.city, chosen.date, chosen.slot)
    channel = default_channel(model) if chosen.channel is None else chosen.channel
    if not 0 <= channel < model.channels:
        raise DataError(f"--channel {channel}: the model has channels 0 to {model.channels - 1}")
    window = default_collate([cities.window(day, slot - model.past)])
    past, truth = window["frames"][:, : model.past], window["frames"][0, model.past :]
    with torch.inference_mode():
        predicted = forecast(past, window)[0].clamp(0, 1)
    make_folder(out)
    stem = f"{day.city}-{day.date}-{slot:03d}"  # a video's name may hold dots
    written = {suffix: out / f"{stem}{suffix}" for suffix in (".h5", ".png", ".gif")}
    _write_array(written[".h5"], predicted.numpy(), day, slot)
    arrays = past[0].numpy(), truth.numpy(), predicted.numpy()
    title = f"{figures.run_name(options.run)}\n{day.city}, {day.date}, predicted from {cities.layout.time(slot)}"
    figures.save(figures.forecast_figure(*arrays, title, cities.layout, channel), written[".png"])
    figures.forecast_animation(*arrays, written[".gif"], cities.layout, channel)
    for path in written.values():
        console.print(f"wrote {path}")


def _write_array(path: Path, forecast: np.ndarray, day: DayFile, slot: int) -> None:
    """(horizon, H, W, C) uint8, 0..255, dataset `array`, as in Traffic4cast's files."""
    values = np.rint(forecast.transpose(0, 2, 3, 1) * 255).astype(np.uint8)
    with writing_hdf5(path) as file:
        dataset = file.create_dataset("array", data=values, compression="gzip", fletcher32=True)
        dataset.attrs.update({"city": shown(day.city), "date": shown(day.date), "first_slot": slot})
        seal(dataset)
