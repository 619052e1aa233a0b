"""Score trained models on their validation days, compared with naive baselines."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from crevnet.cli.command_parser import CommandParser
from crevnet.cli.console import SCORING, console, print_tables
from crevnet.cli.trained import add_run_options
from crevnet.machine.errors import SettingsError


def add_options(parser: CommandParser) -> None:
    parser.add_option("run", type=Path, nargs="+", help="Folders of runs, as crevnet fit writes them")
    parser.add_option("--ensemble", action="store_true", help="Also score the mean of the runs' forecasts")
    parser.add_option("--json", type=Path | None, default=None, help="File that receives the scores as JSON")
    add_run_options(parser)


def run(options: Any) -> None:
    from crevnet.cli.score_table import score_tables
    from crevnet.evaluation.comparison import compare
    from crevnet.evaluation.scores import mean_over_cities
    from crevnet.evaluation.scores_json import check_score_file, write_score_file

    runs = options.run
    if len(set(runs)) < len(runs):
        raise SettingsError(f"a run is named twice: {' '.join(map(str, runs))}")
    if options.ensemble and len(runs) == 1:
        raise SettingsError("--ensemble is the mean of several runs: name more of them")
    check_score_file(options.json)
    with console.status(SCORING):
        found = compare(runs, options.data, options.checkpoint, options.feedback, options.ensemble)
    mean = mean_over_cities(found.by_city)
    cities = ", ".join(found.by_city)
    console.print(f"{cities}: {found.windows} windows, {found.past} frames seen, {found.horizon} predicted")
    print_tables(score_tables(mean, found.channels, found.horizons, found.layout, console.width))
    settings = {
        "windows": found.windows,
        "horizons": list(found.horizons),
        "feedback": options.feedback,
        "checkpoint": options.checkpoint,
    }
    by_city = {"mean over cities": mean, **found.by_city}
    scores = {city: {name: asdict(s) for name, s in of_city.items()} for city, of_city in by_city.items()}
    write_score_file(options.json, {**settings, **scores})
