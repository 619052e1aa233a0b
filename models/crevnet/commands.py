"""What the commands do, with their output on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch.utils.data import default_collate

from crevnet import figures
from crevnet.data import (
    DataError,
    DayFile,
    DayReader,
    Layout,
    MovingMNIST,
    SyntheticCity,
    cached_road_map,
    layout_of,
    open_day,
    repack,
    unit_interval,
    write_city,
    write_movies,
)
from crevnet.data.chosen_window import MORNING, choose_window, default_channel
from crevnet.data.city_data import CityData
from crevnet.data.files.hdf5_files import writing_hdf5
from crevnet.data.files.sealed import seal
from crevnet.evaluation.comparison import compare, trained
from crevnet.evaluation.run_figures import run_figures
from crevnet.evaluation.score_file import check_score_file, write_score_file
from crevnet.evaluation.scores import Scores, mean_over_cities
from crevnet.figures.curves import learning_curves
from crevnet.machine.errors import SettingsError
from crevnet.machine.files import quoted, shown
from crevnet.machine.folders import make_folder
from crevnet.machine.processes import go_alone, is_first
from crevnet.networks.crevnet.network import Feedback
from crevnet.recipe.settings import RecipeSettings
from crevnet.score_table import score_tables
from crevnet.settings import DataSettings, RunSettings, load_settings, save_yaml
from crevnet.traffic4cast.recipe.paper import Recipe
from crevnet.training.checkpoints import checkpoint_path
from crevnet.training.recipe_folders import begun_runs, is_recipe, score_of, scores_file
from crevnet.training.trainer import train

console = Console(highlight=False, soft_wrap=True)


def fit(settings: RunSettings, folder: Path, resume: bool) -> None:
    last = checkpoint_path(folder, "last")
    before = last.stat().st_mtime_ns if last.is_file() else None
    best = train(settings, folder, resume)
    if last.stat().st_mtime_ns == before:
        limit = "" if settings.training.max_minutes is None else " or --training.max_minutes"
        console.print(
            f"{folder} had been trained to its end, and nothing was left to do: raise --training.epochs (it is "
            f"{settings.training.epochs}){limit} to train on"
        )
    console.print(
        f"best validation {settings.model.score_name} {best:.4e}; run folder {folder} (next: crevnet evaluate "
        f"{quoted(folder)})"
    )


def recipe(folder: Path, settings: RecipeSettings) -> None:
    cooked = Recipe(folder, settings)
    steps = list(cooked.steps())
    measure = settings.base.model.score_name
    for number, step in enumerate(steps, 1):
        where = f"{number} of {len(steps)}, {step.name}"
        if step.score is None:
            console.print(f"{where}: {'going on' if step.is_begun else 'training'} in {step.folder}")
            step.run()
        console.print(f"{where}: best validation {measure} {step.score:.4e}")
    go_alone()  # or the first would score its share of the windows
    if not is_first():
        return
    with console.status("scoring; the first time, all training days are read for their slots' means"):
        scores = cooked.scores()
    _print_scores(scores, settings.base.model.channels, cooked.frames, cooked.data.layout)
    save_yaml(scores_file(folder), {name: asdict(found) for name, found in scores.items()})
    console.print(f"wrote {scores_file(folder)}")


def evaluate(
    runs: Sequence[Path],
    data: DataSettings,
    checkpoint: str,
    feedback: Feedback | None,
    ensemble: bool,
    out: Path | None,
) -> None:
    if len(set(runs)) < len(runs):
        raise SettingsError(f"a run is named twice: {' '.join(map(str, runs))}")
    if ensemble and len(runs) == 1:
        raise SettingsError("--ensemble is the mean of several runs: name more of them")
    check_score_file(out)
    with console.status("scoring; the first time, all training days are read for their slots' means"):
        found = compare(runs, data, checkpoint, feedback, ensemble)
    table = mean_over_cities(found.by_city)
    cities = ", ".join(found.by_city)
    console.print(f"{cities}: {found.windows} windows, {found.past} frames seen, {found.horizon} predicted")
    _print_scores(table, found.channels, found.horizons, found.layout)
    result = {
        "windows": found.windows,
        "horizons": list(found.horizons),
        "feedback": feedback,
        "checkpoint": checkpoint,
        "mean over cities": table,
        **found.by_city,
    }
    plain = {k: {n: asdict(s) for n, s in v.items()} if isinstance(v, dict) else v for k, v in result.items()}
    write_score_file(out, plain)


def predict(
    run: Path,
    data: DataSettings,
    checkpoint: str,
    feedback: Feedback | None,
    city: str | None,
    date: str | None,
    slot: int | None,
    channel: int | None,
    out: Path,
) -> None:
    model = load_settings(run).model
    cities = CityData(data, model)
    forecast = trained(run, checkpoint, feedback, cities)
    day, slot = choose_window(cities.validation_days, data.validation_slots, model, city, date, slot)
    if channel is None:
        channel = default_channel(model)
    if not 0 <= channel < model.channels:
        raise DataError(f"--channel {channel}: the model has channels 0 to {model.channels - 1}")
    window = default_collate([cities.window(day, slot - model.past)])
    past, truth = window["frames"][:, : model.past], window["frames"][0, model.past :]
    with torch.inference_mode():
        predicted = forecast(past, window)[0].clamp(0, 1)
    make_folder(out)
    stem = f"{day.city}-{day.date}-{slot:03d}"  # of a movie's name, which may hold dots
    written = {suffix: out / f"{stem}{suffix}" for suffix in (".h5", ".png", ".gif")}
    _write_prediction(written[".h5"], predicted.numpy(), day, slot)
    arrays = past[0].numpy(), truth.numpy(), predicted.numpy()
    title = f"{figures.run_name(run)}\n{day.city}, {day.date}, predicted from {cities.layout.time(slot)}"
    figures.save(figures.forecast_figure(*arrays, title, cities.layout, channel), written[".png"])
    figures.forecast_animation(*arrays, written[".gif"], cities.layout, channel)
    for path in written.values():
        console.print(f"wrote {path}")


def draw(run: Path, data: DataSettings, checkpoint: str, feedback: Feedback | None, out: Path) -> None:
    make_folder(out)
    with console.status("drawing; the first time, all training days are read for their slots' means"):
        for name, figure in run_figures(run, data, checkpoint, feedback):
            path = out / f"{name}.png"
            figures.save(figure, path)
            console.print(f"wrote {path}")
    predict(run, data, checkpoint, feedback, None, None, None, None, out)


def show(path: Path, slot: int | None, out: Path | None) -> None:
    if out is not None and out.suffix != ".png":
        raise SettingsError(f"--out {out}: name a .png file")
    if out is not None and not out.parent.is_dir():
        raise SettingsError(f"--out {out}: there is no folder {out.parent}: make it, or name another one")
    if not path.exists():
        raise SettingsError(f"{path} does not exist: give a run's or a recipe's folder, or a day file (.h5)")
    if is_recipe(path):
        _show_recipe(path)
    elif path.is_dir():
        _show_run(path)
    else:
        _show_day(open_day(path), slot, out)


def synth(root: Path, city: SyntheticCity) -> None:
    days = city.training_days + city.validation_days
    with _progress(f"{city.name}: {days} days of {city.height} x {city.width}") as progress:
        paths = write_city(city, root, progress)
    console.print(f"wrote {len(paths)} days to {root / city.name} (next: crevnet fit --data.root {quoted(root)})")


def moving_mnist(root: Path, movies: MovingMNIST) -> None:
    with _progress(f"{movies.training + movies.validation} movies of two digits") as progress:
        paths = write_movies(movies, root, progress)
    fit = f"crevnet fit --preset moving-mnist --protocol movies --data.root {quoted(root)}"
    console.print(f"wrote {len(paths)} movies to {root} (next: {fit})")


def repack_data(source: Path, target: Path) -> None:
    with _progress(f"{source} to {target}") as progress:
        paths = repack(source, target, progress)
    size = sum(path.stat().st_size for path in paths) / 2**30
    console.print(f"{target} holds {len(paths)} files, {size:.2f} GiB (next: crevnet fit --data.root {quoted(target)})")


@contextmanager
def _progress(title: str) -> Iterator[Callable[[float], None]]:
    """A bar on the terminal, moved by calls with the share of the work that is done."""
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=1.0)
        yield lambda done: progress.update(task, completed=done)


def _print_scores(scores: Mapping[str, Scores], channels: int, horizons: Sequence[int], layout: Layout) -> None:
    names = [layout.channel_name(c) for c in range(channels)], [layout.lead(horizon) for horizon in horizons]
    for table in score_tables(scores, *names, layout.has_roads):
        Console(highlight=False, width=max(console.width, 34 + 12 * len(table.columns))).print(table)


def _write_prediction(path: Path, forecast: np.ndarray, day: DayFile, slot: int) -> None:
    """(horizon, H, W, C) uint8, 0..255, dataset `array`, as in Traffic4cast's files."""
    values = np.rint(forecast.transpose(0, 2, 3, 1) * 255).astype(np.uint8)
    with writing_hdf5(path) as file:
        dataset = file.create_dataset("array", data=values, compression="gzip", fletcher32=True)
        dataset.attrs.update({"city": shown(day.city), "date": shown(day.date), "first_slot": slot})
        seal(dataset)


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
    for tag, curve in learning_curves(folder).items():
        if tag.startswith(("train/", "val/")):
            value, step = curve.values[-1], curve.steps[-1]
            table.add_row(tag, f"{value:.4e} at step {step}, {np.nanmin(curve.values):.4e} at best")
    console.print(table)
    console.print(f"learning curves: tensorboard --logdir {quoted(folder)}")


def _show_recipe(folder: Path) -> None:
    table = Table(title=str(folder), title_justify="left")
    table.add_column("run")
    table.add_column("best validation score", justify="right")
    for run in begun_runs(folder):
        score = score_of(run)
        table.add_row(str(run.relative_to(folder)), "being trained" if score is None else f"{score:.4e}")
    console.print(table)
    if scores_file(folder).is_file():
        console.print(f"its table is in {scores_file(folder)} (next: crevnet submit {quoted(folder)} --out FOLDER)")
    else:
        console.print(
            f"next: crevnet recipe paper --out {quoted(folder)}, which goes on with the runs that are not done"
        )


def _show_day(day: DayFile, slot: int | None, out: Path | None) -> None:
    if slot is None:
        slot = MORNING if day.shape[0] > MORNING else day.shape[0] // 2
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
