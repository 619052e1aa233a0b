"""Score submissions by the competition's formula, compared with naive baselines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crevnet.cli.challenge import add_challenge, add_protocol, challenge_of
from crevnet.cli.command_parser import CommandParser
from crevnet.cli.console import console, counting_bar, print_tables
from crevnet.data.errors import DataError
from crevnet.machine.errors import SettingsError

if TYPE_CHECKING:
    from rich.table import Table

    from crevnet.data.files.days import DayFile
    from crevnet.data.settings import DataSettings
    from crevnet.traffic4cast.checking import Submission
    from crevnet.traffic4cast.competition_scores import CompetitionScores
    from crevnet.traffic4cast.interface import CaseFile, Challenge


def add_options(parser: CommandParser) -> None:
    parser.add_option(
        "submission", type=Path, nargs="+", help="Folders or zips of submissions, as crevnet submit writes them"
    )
    parser.add_option("--truth", type=Path, required=True, help="Folder of the test cases and their truth")
    add_protocol(parser)
    add_challenge(parser)
    parser.add_option("--json", type=Path | None, default=None, help="File that receives the scores as JSON")


def run(options: Any) -> None:
    from crevnet.evaluation.scores_json import check_score_file, write_score_file
    from crevnet.traffic4cast.challenges import challenge
    from crevnet.traffic4cast.competition_scores import mean_competition_scores

    paths, data, chosen = options.submission, options.data, challenge_of(options)
    check_score_file(options.json)
    if len(set(paths)) < len(paths):
        raise SettingsError(f"a submission is named twice: {' '.join(map(str, paths))}")
    asked = challenge(data, chosen)
    files = asked.case_files(options.truth, data.cities)
    submissions = {"submission" if len(paths) == 1 else str(path): _without_problems(path, files) for path in paths}
    for file in files:
        file.truth(0)  # a missing truth is reported now, not after minutes
    days = _training_days(replace(data, cities=sorted({file.city for file in files})), options.truth)
    by_city = _scores(submissions, files, days, asked)
    mean = mean_competition_scores(by_city)
    print_tables(_tables(mean, by_city, asked))
    everything = {"mean over cities": mean, **by_city}
    scores = {city: {name: asdict(s) for name, s in of_city.items()} for city, of_city in everything.items()}
    write_score_file(options.json, {"protocol": data.protocol, **asdict(chosen), **scores})


def _without_problems(path: Path, files: Sequence[CaseFile]) -> Submission:
    """The submission. Raises DataError, after a line for each problem, if the competition would refuse some of its files."""
    from crevnet.traffic4cast.checking import Submission, problems

    submission = Submission(path)
    found = problems(submission, files)
    for problem in found:
        console.print(problem, markup=False)
    if found:
        raise DataError(
            f"{path} cannot be scored: {len(found)} problems, listed above; write it again with crevnet submit"
        )
    return submission


def _training_days(data: DataSettings, truth: Path) -> Sequence[DayFile]:
    """The days of the historical mean: those below data.root if it is given, else those below the truth's folder, if any."""
    from crevnet.data.city_data import open_training_days

    try:
        return open_training_days(replace(data, root=data.root or truth))
    except DataError as error:
        if data.root is not None:
            raise
        console.print(f"no historical mean: {error}", markup=False)
        return ()


def _scores(
    submissions: Mapping[str, Submission], files: Sequence[CaseFile], days: Sequence[DayFile], asked: Challenge
) -> dict[str, dict[str, CompetitionScores]]:
    """The scores of each city's submissions and naive baselines."""
    from crevnet.traffic4cast.competition_scores import score_city
    from crevnet.traffic4cast.forecasting import SlotMean, naive_forecasts

    naive = naive_forecasts(asked.protocol)
    by_city = {}
    with counting_bar(f"{len(files)} files", sum(file.shape[0] for file in files)) as advance:
        for city, of_city in groupby(files, key=lambda file: file.city):
            if days:
                naive["historical mean"] = SlotMean([day for day in days if day.city == city], asked.protocol)
            by_city[city] = score_city(submissions, of_city, naive, asked, advance)
    return by_city


def _tables(
    mean: Mapping[str, CompetitionScores], by_city: Mapping[str, Mapping[str, CompetitionScores]], asked: Challenge
) -> Iterator[Table]:
    from crevnet.cli.score_table import fitting_tables

    unit = "of values / 255" if asked.unit < 1 else "of values 0 to 255"
    console.print(f"Traffic4cast {asked.protocol.name}, {', '.join(by_city)}: mean squared error {unit}")
    horizons = [f"+{5 * horizon} min" for horizon in asked.protocol.horizons]
    hours = [f"{hour:02d}:00" for hour in next(iter(mean.values())).mse_by_hour]
    groups = {
        "": _columns(["score"], [[s.mse] for s in mean.values()]),
        "channel": _columns(asked.protocol.channels, [s.mse_by_channel for s in mean.values()]),
        "horizon": _columns(horizons, [s.mse_by_horizon for s in mean.values()]),
        "city": _columns(by_city, [[of_city[name].mse for of_city in by_city.values()] for name in mean]),
        "hour of the day": _columns(hours, [s.mse_by_hour.values() for s in mean.values()]),
    }
    return fitting_tables("score", [*mean], groups, console.width)


def _columns(titles: Iterable[str], rows: Iterable[Iterable[float]]) -> dict[str, list[str]]:
    """Each column's cells, of rows of values."""
    cells = [[f"{value:#.4g}" for value in row] for row in rows]
    return {title: list(column) for title, column in zip(titles, zip(*cells, strict=True), strict=True)}
