"""Describe the folder of a run or recipe, or a day file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crevnet.cli.command_parser import CommandParser
from crevnet.cli.console import console
from crevnet.machine.errors import SettingsError
from crevnet.machine.files import quoted
from crevnet.training.recipe_folders import begun_runs, is_recipe, score_of, scores_file

if TYPE_CHECKING:
    from rich.table import Table

    from crevnet.data.files.days import DayFile
    from crevnet.figures.curves import Curve
    from crevnet.networks.config import ModelConfig
    from crevnet.training.settings import RunSettings


def add_options(parser: CommandParser) -> None:
    parser.add_option("path", type=Path, help="Folder of a run or recipe, or a day file (.h5)")
    parser.add_option("--slot", type=int | None, default=None, help="Time slot of a day to draw, by default 08:00")
    parser.add_option(
        "--out", type=Path | None, default=None, metavar="FILE", help="PNG file that receives the drawing of a day"
    )


def run(options: Any) -> None:
    path, out = options.path, options.out
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
        _show_day(path, options.slot, out)


def _show_run(folder: Path) -> None:
    """Score, model, data and progress, and then every setting and curve."""
    from crevnet.figures.curves import learning_curves
    from crevnet.training.settings import load_settings

    settings = load_settings(folder)
    curves = learning_curves(folder)
    table = _rows(str(folder))
    table.add_row("score", _score(settings.model, curves))
    table.add_row("model", _model(settings.model))
    cities = "all cities" if settings.data.cities is None else ", ".join(settings.data.cities)
    what = "videos" if settings.data.protocol == "movies" else f"{cities} (Traffic4cast {settings.data.protocol})"
    table.add_row("data", f"{settings.data.root}: {what}")
    table.add_row("progress", _progress(settings, curves))
    console.print(table)
    console.print(_details(folder, settings, curves))
    console.print(f"learning curves: tensorboard --logdir {quoted(folder)}")


def _score(model: ModelConfig, curves: dict[str, Curve]) -> str:
    import numpy as np

    curve = curves.get(model.score_tag)
    if curve is None or not np.isfinite(curve.values).any():
        return "none yet"
    best = int(np.nanargmin(curve.values))
    return f"best validation {model.score_name} {curve.values[best]:.4e}, in epoch {best + 1}"


def _model(model: ModelConfig) -> str:
    import torch

    from crevnet.networks.models import make_network

    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in make_network(model).parameters())
    return f"{model.title}, {parameters:,} parameters: {model.past} frames seen, {model.horizon} predicted"


def _progress(settings: RunSettings, curves: dict[str, Curve]) -> str:
    validations = curves.get(settings.model.score_tag)
    return f"{0 if validations is None else len(validations.steps)} of {settings.training.epochs} epochs"


def _details(folder: Path, settings: RunSettings, curves: dict[str, Curve]) -> Table:
    import numpy as np

    from crevnet.cli.value_names import written
    from crevnet.training.checkpoint_reading import checkpoint_path

    table = _rows("details")
    for which in ("best", "last"):
        path = checkpoint_path(folder, which)
        size = f"{path} ({path.stat().st_size / 2**20:.1f} MiB)" if path.exists() else "none"
        table.add_row(f"{which} checkpoint", size)
    for tag, curve in curves.items():
        if tag.startswith(("train/", "val/")):
            value, step = curve.values[-1], curve.steps[-1]
            table.add_row(tag, f"{value:.4e} at step {step}, lowest {np.nanmin(curve.values):.4e}")
    for section, values in asdict(settings).items():
        for name, value in values.items():
            table.add_row(f"{section}.{name}", written(value) or "none")
    return table


def _show_recipe(folder: Path) -> None:
    from rich.table import Table

    table = Table(title=str(folder), title_justify="left")
    table.add_column("run")
    table.add_column("best validation score", justify="right")
    for begun in begun_runs(folder):
        score = score_of(begun)
        table.add_row(str(begun.relative_to(folder)), "in training" if score is None else f"{score:.4e}")
    console.print(table)
    if scores_file(folder).is_file():
        console.print(f"scores: {scores_file(folder)} (next: crevnet submit {quoted(folder)} --out FOLDER)")
    else:
        console.print(f"next: crevnet recipe paper --out {quoted(folder)}, which continues with the unfinished runs")


def _show_day(path: Path, slot: int | None, out: Path | None) -> None:
    from crevnet import figures
    from crevnet.data.chosen_window import MORNING
    from crevnet.data.errors import DataError
    from crevnet.data.files.days import open_day
    from crevnet.data.files.layouts import layout_of
    from crevnet.data.maps.road_map import cached_road_map

    day = open_day(path)
    if slot is None:
        slot = MORNING if day.shape[0] > MORNING else day.shape[0] // 2
    if not 0 <= slot < day.shape[0]:
        raise DataError(f"--slot {slot}: {path} has slots 0 to {day.shape[0] - 1}")
    roads = cached_road_map([day])[0].numpy()
    frame = _frame(day, slot)
    table = _rows(str(path))
    table.add_row("slots, height, width, channels", " x ".join(map(str, day.shape)))
    table.add_row("pixels with data in any slot", f"{(roads > 0).mean():.1%}")
    layout = layout_of(path)
    for channel, values in enumerate(frame * 255):
        known = values[values > 0]
        share = f"{known.size / values.size:.1%} of the pixels"
        found = f"{share}, mean {known.mean():.1f} of 255" if known.size else "no data"
        table.add_row(f"{layout.channel_name(channel)}, slot {slot}", found)
    console.print(table)
    if out is not None:
        figures.save(figures.day_figure(frame, roads, f"{path.name}, slot {slot}", layout), out)
        console.print(f"wrote {out}")


def _frame(day: DayFile, slot: int) -> Any:
    """(C, H, W), values in [0, 1]."""
    import torch

    from crevnet.data.files.days import DayReader, unit_interval

    return unit_interval(torch.from_numpy(DayReader().read(day, slot, slot + 1)[0])).numpy().transpose(2, 0, 1)


def _rows(title: str) -> Table:
    """A table of names and values."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    return table
