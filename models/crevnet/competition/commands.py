"""What the competition's commands do, with their output on the terminal: submit, score and data holdout."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from crevnet.competition.settings import ChallengeSettings, challenge
from crevnet.data import DataError, DayFile
from crevnet.data.city_data import open_training_days, open_validation_days
from crevnet.evaluation.score_file import check_score_file, write_score_file
from crevnet.machine.errors import SettingsError
from crevnet.machine.files import quoted
from crevnet.networks.crevnet.network import Feedback
from crevnet.settings import DataSettings
from crevnet.traffic4cast.checking import Submission, problems
from crevnet.traffic4cast.forecasting import (
    CaseForecast,
    RecipeForecast,
    RunForecast,
    SlotMean,
    city_runs,
    ensemble,
    naive_forecasts,
)
from crevnet.traffic4cast.interface import CaseFile, Challenge
from crevnet.traffic4cast.scoring import CompetitionScores, mean_over_cities, score_city
from crevnet.traffic4cast.submission import write_submission, zip_submission
from crevnet.training.checkpoints import checkpoint_path
from crevnet.training.recipe_folders import base_run, is_recipe

console = Console(highlight=False, soft_wrap=True)


def submit(
    runs: Sequence[Path],
    weights: Sequence[float] | None,
    chosen: ChallengeSettings,
    data: DataSettings,
    test: Path | None,
    checkpoint: str,
    feedback: Feedback | None,
    out: Path,
    overwrite: bool,
) -> None:
    if weights is not None and (len(weights) != len(runs) or not all(0 < weight < np.inf for weight in weights)):
        raise SettingsError(f"--weights {list(weights)}: say one positive number for each of the {len(runs)} runs")
    root = test or data.root
    if root is None:
        raise SettingsError("no folder of test cases was given: say --test FOLDER or --data.root FOLDER")
    asked = challenge(data, chosen)
    files = asked.case_files(root, data.cities)
    data = replace(data, cities=sorted({file.city for file in files}))
    days = [file.case(0).day for file in {file.city: file for file in files}.values()]

    def forecast_of(run: Path) -> CaseForecast:
        return RunForecast(run, data, days, checkpoint, feedback, asked.protocol)

    members: list[CaseForecast] = []
    made_of: list[Path] = []
    for run in runs:
        if is_recipe(run):
            made_of += [base_run(run), *(part for day in days for part in city_runs(run, day.city, asked.protocol))]
            members.append(RecipeForecast(run, forecast_of, asked.protocol))
        else:
            made_of.append(run)
            members.append(forecast_of(run))
    made_from = {
        "checkpoints": [_digest(checkpoint_path(run, checkpoint)) for run in made_of],
        "weights": weights,
        "feedback": feedback,
        "test": str(root.resolve()),
        "training": str(data.root and data.root.resolve()),
        "protocol": data.protocol,
        **asdict(chosen),
    }
    with _progress(f"{len(files)} files", sum(file.shape[0] for file in files)) as advance:
        write_submission(files, ensemble(members, weights), out, json.dumps(made_from), overwrite, advance)
    console.print(
        f"wrote {len(files)} files to {out} and {zip_submission(out)} (next, with truth: {_score_command(data, chosen)} "
        f"{quoted(out)} --truth FOLDER)"
    )


def score(
    submissions: Sequence[Path], chosen: ChallengeSettings, truth: Path, data: DataSettings, out: Path | None
) -> None:
    check_score_file(out)
    if len(set(submissions)) < len(submissions):
        raise SettingsError(f"a submission is named twice: {' '.join(map(str, submissions))}")
    asked = challenge(data, chosen)
    files = asked.case_files(truth, data.cities)
    found = {
        "submission" if len(submissions) == 1 else str(path): _without_problems(path, files) for path in submissions
    }
    for file in files:
        file.truth(0)  # a truth that is missing is said now, not after minutes
    naive = naive_forecasts(asked.protocol)
    days = _training_days(replace(data, cities=sorted({file.city for file in files})), truth)
    by_city = {}
    with _progress(f"{len(files)} files", sum(file.shape[0] for file in files)) as advance:
        for city, of_city in groupby(files, key=lambda file: file.city):
            if days:
                naive["historical mean"] = SlotMean([day for day in days if day.city == city], asked.protocol)
            by_city[city] = score_city(found, of_city, naive, asked, advance)
    mean = mean_over_cities(by_city)
    _print_scores(mean, by_city, asked)
    everything = {"mean over cities": mean, **by_city}
    plain = {city: {name: asdict(s) for name, s in scores.items()} for city, scores in everything.items()}
    write_score_file(out, {"protocol": data.protocol, **asdict(chosen), **plain})


def _without_problems(path: Path, files: Sequence[CaseFile]) -> Submission:
    """The submission; DataError, after a line for each, where the competition would refuse some of its files."""
    submission = Submission(path)
    wrong = problems(submission, files)
    for problem in wrong:
        console.print(problem, markup=False)
    if wrong:
        raise DataError(
            f"{path} cannot be scored: {len(wrong)} problems, listed above; write it anew with crevnet submit"
        )
    return submission


def hold_out(chosen: ChallengeSettings, data: DataSettings, count: int, seed: int, out: Path) -> None:
    if count < 1:
        raise SettingsError(f"--count {count}: draw at least 1")
    asked, days = challenge(data, chosen), open_validation_days(data)
    rng = np.random.default_rng(seed)
    for _, of_city in groupby(days, key=lambda day: day.city):
        for path in asked.hold_out(list(of_city), count, rng, out):
            console.print(f"wrote {path}, with its truth beside it")
    same = _same_options(data, chosen)
    console.print(
        f"next: crevnet submit RUN --test {quoted(out)}{same} --out FOLDER, and {_score_command(data, chosen)} FOLDER "
        f"--truth {quoted(out)}"
    )


def _score_command(data: DataSettings, chosen: ChallengeSettings) -> str:
    return f"crevnet score --protocol {data.protocol}{_same_options(data, chosen)}"


def _same_options(data: DataSettings, chosen: ChallengeSettings) -> str:
    """Those of the challenge that the next command needs, too."""
    if data.protocol == "2021":
        return f" --task {chosen.task}"
    return f" --slots '{[*chosen.slots]}'" if chosen.slots else ""


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _training_days(data: DataSettings, truth: Path) -> Sequence[DayFile]:
    """For the historical mean: below data.root, where it is given; else below the truth's folder, if there are any."""
    try:
        return open_training_days(replace(data, root=data.root or truth))
    except DataError as error:
        if data.root is not None:
            raise
        console.print(f"without the historical mean, as {error}", markup=False)
        return ()


@contextmanager
def _progress(what: str, cases: int) -> Iterator[Callable[[int], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(what, total=cases)
        yield lambda done: progress.advance(task, done)


def _print_scores(
    mean: dict[str, CompetitionScores], by_city: dict[str, dict[str, CompetitionScores]], asked: Challenge
) -> None:
    unit = "of values / 255" if asked.unit < 1 else "of values 0 to 255"
    horizons = [f"+{5 * horizon} min" for horizon in asked.protocol.horizons]
    _print_table(
        f"Traffic4cast {asked.protocol.name}, {', '.join(by_city)}: mean squared error {unit}",
        ("score", *asked.protocol.channels, *horizons),
        {name: (s.mse, *s.mse_by_channel, *s.mse_by_horizon) for name, s in mean.items()},
    )
    _print_table("by city", by_city, {name: [scores[name].mse for scores in by_city.values()] for name in mean})
    hours = [f"{hour:02d}:00" for hour in next(iter(mean.values())).mse_by_hour]
    _print_table("by hour of the day", hours, {name: s.mse_by_hour.values() for name, s in mean.items()})


def _print_table(title: str, columns: Iterable[str], rows: dict[str, Iterable[float]]) -> None:
    table = Table("forecast", title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for name, values in rows.items():
        table.add_row(name, *(f"{value:#.4g}" for value in values))
    Console(highlight=False, width=max(console.width, 34 + 12 * len(table.columns))).print(table)
