"""Train a model, resume a run, or fine-tune one. The run folder receives the configuration, checkpoints and logs for
TensorBoard.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from crevnet.cli.command_parser import CommandParser
from crevnet.cli.console import console
from crevnet.cli.starting import COMMON, add_model_name, add_start, run_defaults
from crevnet.machine.files import quoted
from crevnet.training.settings import RunSettings, add_sections


def add_options(parser: CommandParser) -> None:
    add_start(parser)
    parser.add_option("--out", type=Path, default=Path("runs/crevnet"), help="Folder of the new run")
    parser.add_option(
        "--resume", type=Path | None, default=None, help="Folder of a run to resume with its configuration"
    )
    add_sections(parser, run_defaults(parser))
    add_model_name(parser)
    parser.list_in_help(*COMMON, "model.memory_budget", "training.max_minutes", "training.start", "training.devices")


def run(options: Any) -> None:
    from crevnet.training.checkpoint_reading import checkpoint_path
    from crevnet.training.trainer import train

    settings = RunSettings(options.model, options.data, options.training)
    folder = options.resume or options.out
    last = checkpoint_path(folder, "last")
    before = last.stat().st_mtime_ns if last.is_file() else None
    best = train(settings, folder, options.resume is not None, console.print)
    if last.stat().st_mtime_ns == before:
        limit = "" if settings.training.max_minutes is None else " or --training.max_minutes"
        console.print(
            f"training of {folder} is already complete: raise --training.epochs (it is {settings.training.epochs}){limit} "
            "to continue"
        )
    console.print(
        f"best validation {settings.model.score_name} {best:.4e}; run folder {folder} (next: crevnet evaluate "
        f"{quoted(folder)})"
    )
