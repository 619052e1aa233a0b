"""What the commands do, with their output on the terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import h5py
import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch.utils.data import default_collate

from crevnet import figures, forecasts
from crevnet.data import (
    DataError,
    DayFile,
    DayReader,
    Layout,
    SyntheticCity,
    cached_road_map,
    layout_of,
    open_day,
    unit_interval,
    write_city,
)
from crevnet.data.city_data import CityData
from crevnet.evaluation import CrevNetForecast, Scores, mean_over_cities, score
from crevnet.network import Feedback
from crevnet.settings import DataSettings, RunSettings, SettingsError, load_settings
from crevnet.training import checkpoint_path, load_network, train

console = Console(highlight=False, soft_wrap=True)

MORNING = 96
"""The slot of 08:00."""


def fit(settings: RunSettings, folder: Path, resume: bool) -> None:
    best = train(settings, folder, resume)
    console.print(f"best validation MSE {best:.4e}; run folder {folder} (next: crevnet evaluate {folder})")


def evaluate(run: Path, data: DataSettings, checkpoint: str, feedback: Feedback, out: Path | None) -> None:
    model = load_settings(run).model
    network = load_network(run, model, checkpoint).to("cuda" if torch.cuda.is_available() else "cpu")
    cities = CityData(data, model)
    horizons = cities.layout.horizons(model.horizon)
    means = forecasts.pixel_means(cities.training_days, data.training_slots)
    by_city: dict[str, dict[str, Scores]] = {}
    windows = 0
    for city in sorted({day.city for day in cities.validation_days}):
        batches = cities.validation_batches(city)
        windows += len(batches.dataset)  # type: ignore[arg-type]
        with torch.inference_mode():
            by_city[city] = score(
                {
                    "CrevNet": CrevNetForecast(network, feedback),
                    "zeros": forecasts.zeros(model.horizon),
                    "last frame": forecasts.last_frame(model.horizon),
                    "mean of last three": forecasts.mean_of_three(model.horizon),
                    "mean of training days": forecasts.training_mean(means[city], model.horizon),
                },
                batches,
                model.past,
                horizons,
            )
    table = mean_over_cities(by_city)
    title = f"{', '.join(by_city)}: {windows} windows, {model.past} frames seen, {model.horizon} predicted"
    _print_scores(table, title, cities.layout, horizons)
    if out is not None:
        result = {
            "windows": windows,
            "horizons": list(horizons),
            "feedback": feedback,
            "checkpoint": checkpoint,
            "mean over cities": table,
            **by_city,
        }
        plain = {k: {n: asdict(s) for n, s in v.items()} if isinstance(v, dict) else v for k, v in result.items()}
        out.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")


def predict(
    run: Path,
    data: DataSettings,
    checkpoint: str,
    feedback: Feedback,
    city: str | None,
    date: str | None,
    slot: int | None,
    channel: int | None,
    out: Path,
) -> None:
    model = load_settings(run).model
    network = load_network(run, model, checkpoint).to("cuda" if torch.cuda.is_available() else "cpu")
    cities = CityData(data, model)
    day = _chosen(cities.validation_days, city, date)
    slots = day.slot_range(data.validation_slots)
    if channel is None:
        channel = min(1, model.channels - 1)  # Traffic4cast's speed
    if not 0 <= channel < model.channels:
        raise DataError(f"--channel {channel}: the model has channels 0 to {model.channels - 1}")
    first, last = slots.start + model.past, slots.stop - model.horizon
    if first > last:
        raise DataError(f"{day.path}: {len(slots)} slots are too few for a window of {model.window} frames")
    if slot is None:
        slot = MORNING if first <= MORNING <= last else (first + last) // 2
    if not first <= slot <= last:
        raise DataError(
            f"--slot {slot}: with {model.past} frames before and {model.horizon} to predict, choose {first} to {last}"
        )
    window = default_collate([cities.window(day, slot - model.past)])
    past, truth = window["frames"][:, : model.past], window["frames"][0, model.past :]
    with torch.inference_mode():
        forecast = CrevNetForecast(network, feedback)(past, window)[0].clamp(0, 1)
    out.mkdir(parents=True, exist_ok=True)
    stem = f"{day.city}-{day.date}-{slot:03d}"  # of a movie's name, which may hold dots
    written = {suffix: out / f"{stem}{suffix}" for suffix in (".h5", ".png", ".gif")}
    _write_prediction(written[".h5"], forecast.numpy(), day, slot)
    arrays = past[0].numpy(), truth.numpy(), forecast.numpy()
    title = f"{day.city}, {day.date}, predicted from {cities.layout.time(slot)}"
    figures.save(figures.forecast_figure(*arrays, title, cities.layout, channel), written[".png"])
    figures.forecast_animation(*arrays, written[".gif"], cities.layout, channel)
    for path in written.values():
        console.print(f"wrote {path}")


def show(path: Path, slot: int, out: Path | None) -> None:
    if out is not None and out.suffix != ".png":
        raise SettingsError(f"--out {out}: name a .png file")
    if path.is_dir():
        _show_run(path)
    else:
        _show_day(open_day(path), slot, out)


def synth(root: Path, city: SyntheticCity) -> None:
    days = city.training_days + city.validation_days
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"{city.name}: {days} days of {city.height} x {city.width}", total=1.0)
        paths = write_city(city, root, lambda done: progress.update(task, completed=done))
    console.print(f"wrote {len(paths)} days to {root / city.name} (next: crevnet fit --data.root {root})")


def _print_scores(scores: dict[str, Scores], title: str, layout: Layout, horizons: Sequence[int]) -> None:
    any_scores = next(iter(scores.values()))
    table = Table(title=title, title_justify="left")
    table.add_column("forecast")
    channels = [layout.channel_name(c) for c in range(len(any_scores.mse_by_channel))]
    for name in ("MSE", "MAE", "MSE on roads", *channels, *map(layout.lead, horizons)):
        table.add_column(name, justify="right", no_wrap=True)
    best = min(s.mse for s in scores.values())
    for name, s in scores.items():
        values = (s.mse, s.mae, s.mse_on_roads, *s.mse_by_channel, *s.mse_by_horizon)
        table.add_row(name, *(f"{v:.3e}" for v in values), style="bold" if s.mse == best else None)
    Console(highlight=False, width=max(console.width, 34 + 12 * len(table.columns))).print(table)


def _chosen(days: Sequence[DayFile], city: str | None, date: str | None) -> DayFile:
    dates = [day.date for day in days] if date is None else [date, date.replace("-", "")]
    found = [day for day in days if city in (None, day.city) and day.date in dates]
    if not found:
        there = ", ".join(f"{day.city} {day.date}" for day in days[:10])
        raise DataError(f"no validation day for --city {city} --date {date}; there are {there}")
    return found[0]


def _write_prediction(path: Path, forecast: np.ndarray, day: DayFile, slot: int) -> None:
    """(horizon, H, W, C) uint8, 0..255, dataset `array`, as in Traffic4cast's files."""
    values = np.rint(forecast.transpose(0, 2, 3, 1) * 255).astype(np.uint8)
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("array", data=values, compression="gzip")
        dataset.attrs.update({"city": day.city, "date": day.date, "first_slot": slot})


def _show_run(folder: Path) -> None:
    settings = load_settings(folder)
    table = Table(title=str(folder), title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for section, values in asdict(settings).items():
        for name, value in values.items():
            table.add_row(f"{section}.{name}", str(value))
    for which in ("best", "last"):
        path = checkpoint_path(folder, which)
        table.add_row(
            f"{which} checkpoint", f"{path} ({path.stat().st_size / 2**20:.1f} MiB)" if path.exists() else "none"
        )
    console.print(table)
    console.print(f"learning curves: tensorboard --logdir {folder}")


def _show_day(day: DayFile, slot: int, out: Path | None) -> None:
    if not 0 <= slot < day.shape[0]:
        raise DataError(f"--slot {slot}: {day.path} has slots 0 to {day.shape[0] - 1}")
    roads = cached_road_map([day])[0].numpy()
    frame = unit_interval(torch.from_numpy(DayReader().read(day, slot, slot + 1)[0])).numpy()
    table = Table(title=str(day.path), title_justify="left", show_header=False)
    table.add_row("slots, height, width, channels", " x ".join(map(str, day.shape)))
    table.add_row("pixels that ever have data", f"{(roads > 0).mean():.1%}")
    layout = layout_of(day.path)
    for c in range(day.shape[3]):
        values = frame[..., c] * 255
        known = values[values > 0]
        what = (
            f"{known.size / values.size:.1%} of the pixels, mean {known.mean():.1f} of 255" if known.size else "no data"
        )
        table.add_row(f"{layout.channel_name(c)}, slot {slot}", what)
    console.print(table)
    if out is not None:
        figures.save(figures.day_figure(frame.transpose(2, 0, 1), roads, f"{day.path.name}, slot {slot}", layout), out)
        console.print(f"wrote {out}")
