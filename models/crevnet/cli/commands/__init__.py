"""The commands. Each is a file of this folder, such as `data_synth.py` for `crevnet data synth`, and a line of `COMMANDS`.

A command's file has a docstring, which is the description in its help, and two functions: `add_options(parser)` declares its
options, and `run(options)` runs it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from crevnet.cli.command_parser import CommandParser

COMMANDS = {
    "fit": "Train a model, resume a run, or fine-tune one",
    "evaluate": "Score runs and naive baselines on validation days",
    "predict": "Predict frames; write HDF5, PNG and GIF",
    "figures": "Draw learning curves, error maps and a prediction",
    "show": "Describe a run or a day file",
    "recipe paper": "Train the paper's recipe: one model, then fine-tuned ones",
    "submit": "Predict a competition's test cases and zip them",
    "score": "Score submissions by the competition's formula",
    "data synth": "Write a synthetic city in Traffic4cast's files",
    "data moving-mnist": "Write videos of Moving MNIST",
    "data repack": "Rewrite day files for faster loading",
    "data holdout": "Make test cases with truth from validation days",
}
"""Each command with the line that `crevnet --help` prints for it, in that order."""


class Command(Protocol):
    """A command's file."""

    __doc__: str | None

    def add_options(self, parser: CommandParser) -> None:
        """Declare the options."""

    def run(self, options: Any) -> None:
        """Run the command with the values of its options."""


def command_named(name: str) -> Command:
    """The file of a command in `COMMANDS`."""
    return cast(Command, import_module(f"{__name__}.{name.replace(' ', '_').replace('-', '_')}"))
