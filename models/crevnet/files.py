"""Files that are whole, whatever happens while they are written, and their names in commands."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_UNFINISHED = ".unfinished"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write a file to, which takes the place of `path` once it is on the disk: until then the old one stays.

    What is raised leaves the old file too. The folder is made where it is missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}{_UNFINISHED}")  # two runs never write the same one
    try:
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill the file that takes the place of `path`. An OSError names `path`."""
    try:
        with replacing(path) as unfinished, unfinished.open("wb") as file:
            write(file)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def quoted(path: Path) -> str:
    """As a shell takes it, for commands that are suggested."""
    return shlex.quote(str(path))


def remove_unfinished(folder: Path) -> None:
    """Remove what a process that was killed while it wrote has left in a folder."""
    for path in folder.glob(f"*{_UNFINISHED}"):
        path.unlink(missing_ok=True)
