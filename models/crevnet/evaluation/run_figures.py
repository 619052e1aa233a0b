"""The figures that describe a trained run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.utils.data import default_collate

from crevnet import figures
from crevnet.data.chosen_window import choose_window
from crevnet.data.city_data import CityData
from crevnet.data.files.layouts import Layout
from crevnet.data.settings import DataSettings
from crevnet.evaluation.error_sums import ErrorSums, error_sums
from crevnet.figures.curves import learning_curves
from crevnet.networks.config import CrevNetConfig, Feedback, ModelConfig
from crevnet.networks.crevnet.network import CrevNet
from crevnet.training.checkpoint_reading import load_network
from crevnet.training.settings import load_settings


def run_figures(
    run: Path, data: DataSettings, checkpoint: str, feedback: Feedback | None
) -> Iterator[tuple[str, Figure]]:
    """Names and figures of a run.

    For each city, there are its errors by pixel, by horizon and, if files are days, by hour. Learning curves are included if the
    run has logs. CrevNet also has a reconstructed input.
    """
    model = load_settings(run).model
    cities = CityData(data, model)
    for city, sums in error_sums(run, data, checkpoint, feedback):
        yield from _error_figures(sums, f"{figures.run_name(run)}, {city}", city, model, cities.layout)
    curves = learning_curves(run)
    if {"train/loss", model.score_tag} <= curves.keys():
        of_run = curves["train/loss"], curves[model.score_tag]
        yield "learning-curves", figures.learning_curves_figure(*of_run, model.score_name, figures.run_name(run))
    if isinstance(model, CrevNetConfig):
        yield "rebuilt-input", _rebuilt_figure(run, data, checkpoint, cities, model)


def _error_figures(
    sums: dict[str, ErrorSums], title: str, city: str, model: ModelConfig, layout: Layout
) -> Iterator[tuple[str, Figure]]:
    best = min((name for name in sums if name != model.title), key=lambda name: sums[name].mse)
    maps = {name: sums[name].by_pixel for name in (model.title, best)}
    yield f"error-maps-{city}", figures.error_maps_figure(maps, title, layout)
    by_horizon = {name: of.by_horizon for name, of in sums.items()}
    horizons = layout.horizons(model.horizon)
    yield f"error-by-horizon-{city}", figures.error_by_horizon_figure(by_horizon, horizons, title, layout)
    if layout.dated:
        by_hour = {name: of.by_hour for name, of in sums.items()}
        yield f"error-by-hour-{city}", figures.error_by_hour_figure(by_hour, title)


@torch.no_grad()
def _rebuilt_figure(run: Path, data: DataSettings, checkpoint: str, cities: CityData, model: CrevNetConfig) -> Figure:
    """The last input frame of one window, and its reconstruction."""
    network = load_network(run, model, checkpoint).eval()
    assert isinstance(network, CrevNet)
    day, slot = choose_window(cities.validation_days, data.validation_slots, model)
    window = default_collate([cities.window(day, slot - model.past)])
    past = window["frames"][:, : model.past]
    *_, rebuilt = network.rebuilt(network.padded(past, window["static"] if model.static else None))
    frame = past[0, -1]
    found = rebuilt[0, : model.channels, : frame.shape[1], : frame.shape[2]]
    title = f"{figures.run_name(run)}, {day.city}, {day.date}, {cities.layout.time(slot - 1)}"
    return figures.rebuilt_figure(frame.numpy(), found.numpy(), title, cities.layout)
