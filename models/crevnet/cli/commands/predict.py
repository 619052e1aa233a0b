"""Predict the frames that begin at a time slot of a validation day. Write them as HDF5, PNG and GIF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from crevnet.cli.command_parser import CommandParser
from crevnet.cli.trained import add_run_options


def add_options(parser: CommandParser) -> None:
    parser.add_option("run", type=Path, help="Folder of a run, as crevnet fit writes it")
    parser.add_option("--city", type=str | None, default=None, help="City, by default the first")
    parser.add_option(
        "--date",
        type=str | None,
        default=None,
        metavar="DATE",
        help="Day, YYYY-MM-DD, or name of a video, by default the first",
    )
    parser.add_option("--slot", type=int | None, default=None, help="First predicted time slot, by default 08:00")
    parser.add_option("--channel", type=int | None, default=None, help="Channel in the pictures, by default 1, speed")
    parser.add_option("--out", type=Path | None, default=None, help="Folder for the results, by default the run's")
    add_run_options(parser)


def run(options: Any) -> None:
    from crevnet.cli.prediction import Chosen, write_prediction

    chosen = Chosen(options.city, options.date, options.slot, options.channel)
    write_prediction(options, chosen, options.out or options.run)
