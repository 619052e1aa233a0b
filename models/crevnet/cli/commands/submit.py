"""Predict a competition's test cases. Write the files of a submission and their zip."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crevnet.cli.challenge import add_challenge, challenge_of, score_command
from crevnet.cli.command_parser import CommandParser
from crevnet.cli.console import console, counting_bar
from crevnet.cli.trained import VALIDATION, add_run_options
from crevnet.machine.errors import SettingsError
from crevnet.machine.files import quoted

if TYPE_CHECKING:
    from crevnet.data.files.days import DayFile
    from crevnet.data.settings import DataSettings
    from crevnet.traffic4cast.forecasting import CaseForecast
    from crevnet.traffic4cast.interface import Challenge


def add_options(parser: CommandParser) -> None:
    parser.add_option(
        "run", type=Path, nargs="+", help="Folders of runs or recipes. Several give the mean of their predictions."
    )
    parser.add_option("--out", type=Path, required=True, help="Folder of the submission")
    parser.add_option("--test", type=Path | None, default=None, help="Folder of the test cases, by default --data.root")
    add_challenge(parser)
    parser.add_option(
        "--weights", type=list[float] | None, default=None, help="Weights of the runs in their mean, by default equal"
    )
    parser.add_option(
        "--overwrite", action="store_true", help="Overwrite files that were made from other runs or options"
    )
    add_run_options(parser, VALIDATION)


def run(options: Any) -> None:
    from crevnet.traffic4cast.challenges import challenge
    from crevnet.traffic4cast.forecasting import ensemble
    from crevnet.traffic4cast.submission import write_submission, zip_submission

    out, chosen = options.out, challenge_of(options)
    _check_weights(options.weights, len(options.run))
    root = options.test or options.data.root
    if root is None:
        raise SettingsError("no folder of test cases was given: add --test FOLDER or --data.root FOLDER")
    asked = challenge(options.data, chosen)
    files = asked.case_files(root, options.data.cities)
    data = replace(options.data, cities=sorted({file.city for file in files}))
    days = [file.case(0).day for file in {file.city: file for file in files}.values()]
    members, runs = _members(options, data, days, asked)
    made_from = {
        "checkpoints": [_digest(run, options.checkpoint) for run in runs],
        "weights": options.weights,
        "feedback": options.feedback,
        "test": str(root.resolve()),
        "training": str(data.root and data.root.resolve()),
        "protocol": data.protocol,
        **asdict(chosen),
    }
    with counting_bar(f"{len(files)} files", sum(file.shape[0] for file in files)) as advance:
        forecast = ensemble(members, options.weights)
        write_submission(files, forecast, out, json.dumps(made_from), options.overwrite, advance)
    console.print(
        f"wrote {len(files)} files to {out} and {zip_submission(out)} (next, with truth: {score_command(data, chosen)} "
        f"{quoted(out)} --truth FOLDER)"
    )


def _check_weights(weights: Sequence[float] | None, runs: int) -> None:
    if weights is not None and (len(weights) != runs or not all(0 < weight < float("inf") for weight in weights)):
        raise SettingsError(f"--weights {list(weights)}: give one positive number for each of the {runs} runs")


def _members(
    options: Any, data: DataSettings, days: Sequence[DayFile], asked: Challenge
) -> tuple[list[CaseForecast], list[Path]]:
    """The forecast of each run or recipe on the command line, and all runs that they consist of."""
    from crevnet.traffic4cast.forecasting import RecipeForecast, RunForecast, city_runs
    from crevnet.training.recipe_folders import base_run, is_recipe

    def forecast_of(run: Path) -> CaseForecast:
        return RunForecast(run, data, days, options.checkpoint, options.feedback, asked.protocol)

    members: list[CaseForecast] = []
    runs: list[Path] = []
    for folder in options.run:
        if is_recipe(folder):
            runs += [base_run(folder), *(run for day in days for run in city_runs(folder, day.city, asked.protocol))]
            members.append(RecipeForecast(folder, forecast_of, asked.protocol))
        else:
            runs.append(folder)
            members.append(forecast_of(folder))
    return members, runs


def _digest(run: Path, checkpoint: str) -> str:
    from crevnet.training.checkpoint_reading import checkpoint_path

    with checkpoint_path(run, checkpoint).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
