"""Make test cases with truth from validation days, to practice a submission on."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

from crevnet.cli.challenge import add_challenge, add_protocol, challenge_of, same_options, score_command
from crevnet.cli.command_parser import CommandParser
from crevnet.cli.console import console
from crevnet.machine.errors import SettingsError
from crevnet.machine.files import quoted


def add_options(parser: CommandParser) -> None:
    parser.add_option("--out", type=Path, required=True, help="Folder that receives the test cases")
    add_protocol(parser)
    add_challenge(parser)
    parser.add_option(
        "--count", type=int, default=100, help="Maximum number per city, of days in 2019 and hours in 2021"
    )
    parser.add_option("--seed", type=int, default=0, help="Seed of the random draw")


def run(options: Any) -> None:
    import numpy as np

    from crevnet.data.city_data import open_validation_days
    from crevnet.traffic4cast.challenges import challenge

    data, out, chosen = options.data, options.out, challenge_of(options)
    if options.count < 1:
        raise SettingsError(f"--count {options.count}: draw at least 1")
    asked, days = challenge(data, chosen), open_validation_days(data)
    rng = np.random.default_rng(options.seed)
    for _, of_city in groupby(days, key=lambda day: day.city):
        for path in asked.hold_out(list(of_city), options.count, rng, out):
            console.print(f"wrote {path} and its truth")
    console.print(
        f"next: crevnet submit RUN --test {quoted(out)}{same_options(data, chosen)} --out FOLDER, and "
        f"{score_command(data, chosen)} FOLDER --truth {quoted(out)}"
    )
