"""The options of commands that use trained runs: the checkpoint, CrevNet's feedback, and the data, by default the runs'."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from crevnet.cli.command_parser import CommandParser
from crevnet.data.settings import DataSettings
from crevnet.machine.errors import SettingsError
from crevnet.networks.config import Feedback
from crevnet.training.recipe_folders import base_run, is_recipe
from crevnet.training.settings import load_settings

_LOADING = ("stride", "flips", "batch_size", "workers")
"""Data settings that do not change which frames are evaluated."""

VALIDATION = ("validation_slots", "validation_windows", "validation_stride")
"""Data settings that do not matter to a submission either."""


def add_run_options(parser: CommandParser, ignored: tuple[str, ...] = ()) -> None:
    """Add them. Of several runs, all data settings must be equal, except those of loading and the `ignored`."""
    parser.add_option("--checkpoint", type=Literal["best", "last"], default="best", help="Checkpoint of each run")
    parser.add_option(
        "--feedback",
        type=Feedback | None,
        default=None,
        help="Feedback of predicted frames in CrevNet: their latents, as by default, or the decoded frames",
    )
    parser.add_class_arguments(DataSettings, "data", default=_data_of_runs(parser, _LOADING + ignored))
    parser.list_in_help("data.root", "data.cities", "data.batch_size", "data.workers")


def _data_of_runs(parser: CommandParser, indifferent: tuple[str, ...]) -> dict[str, Any] | None:
    """The data settings of the runs on the command line. Raises SettingsError if they differ and no option decides."""
    folders = [Path(argument) for argument in parser.arguments]
    runs = [base_run(folder) if is_recipe(folder) else folder for folder in folders]
    settings = {run: asdict(load_settings(run).data) for run in runs if (run / "config.yaml").is_file()}
    if not settings:
        return None
    (first, data), *others = settings.items()
    for run, other in others:
        for name, value in data.items():
            given = parser.value_of(f"--data.{name}") is not None
            if other[name] != value and name not in indifferent and not given:
                raise SettingsError(
                    f"{first} and {run} have different data, data.{name} is {value} and {other[name]}: add --data.{name}"
                )
    return data
