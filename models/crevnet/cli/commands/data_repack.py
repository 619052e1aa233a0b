"""Rewrite a folder's HDF5 files for faster loading: the same frames, one per chunk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from crevnet.cli.command_parser import CommandParser
from crevnet.cli.console import console, progress_bar
from crevnet.machine.files import quoted


def add_options(parser: CommandParser) -> None:
    parser.add_option("source", type=Path, help="Folder with the files, as for --data.root")
    parser.add_option("target", type=Path, help="Folder that receives them, under the same names")


def run(options: Any) -> None:
    from crevnet.data.made.repack import repack

    source, target = options.source, options.target
    with progress_bar(f"{source} to {target}") as progress:
        paths = repack(source, target, progress)
    size = sum(path.stat().st_size for path in paths) / 2**30
    console.print(f"{target} holds {len(paths)} files, {size:.2f} GiB (next: crevnet fit --data.root {quoted(target)})")
