"""Draw a run: learning curves, errors by pixel, horizon and hour, a reconstructed input, and a prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from crevnet.cli.command_parser import CommandParser
from crevnet.cli.console import console
from crevnet.cli.trained import add_run_options


def add_options(parser: CommandParser) -> None:
    parser.add_option("run", type=Path, help="Folder of a run, as crevnet fit writes it")
    parser.add_option("--out", type=Path | None, default=None, help="Folder for the figures, by default RUN/figures")
    add_run_options(parser)


def run(options: Any) -> None:
    from crevnet import figures
    from crevnet.cli.prediction import Chosen, write_prediction
    from crevnet.evaluation.run_figures import run_figures
    from crevnet.machine.folders import make_folder

    out = options.out or options.run / "figures"
    make_folder(out)
    with console.status("drawing; the first time, all training days are read for the means of their time slots"):
        for name, figure in run_figures(options.run, options.data, options.checkpoint, options.feedback):
            path = out / f"{name}.png"
            figures.save(figure, path)
            console.print(f"wrote {path}")
    write_prediction(options, Chosen(), out)
