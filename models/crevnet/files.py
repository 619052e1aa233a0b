"""Files that are whole, whatever happens while they are written, and their names in commands."""

from __future__ import annotations

import os
import shlex
import stat
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


def check_regular(path: Path) -> None:
    """ValueError for a folder, a pipe or a device in the place of a file, before it is opened, which could wait or read forever.

    A symbolic link counts as the file that it leads to.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kind = next((kind for is_kind, kind in _KINDS.items() if is_kind(mode)), "no file")
        raise ValueError(f"it is {kind}, expected a regular file: move it away")


_KINDS = {
    stat.S_ISDIR: "a folder",
    stat.S_ISFIFO: "a named pipe",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
    stat.S_ISSOCK: "a socket",
}


def read_text(path: Path, limit: int = 2**20) -> str:
    """A text file that people write, in UTF-8. ValueError where it is no regular file, or larger than `limit` bytes."""
    check_regular(path)
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"it has more than {limit} bytes, expected a short text: check the path")
    return content.decode("utf-8")


def shown(name: str) -> str:
    """A name for pictures and attributes, which are UTF-8: what is not in it is escaped."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def quoted(path: Path) -> str:
    """As a shell takes it, for commands that are suggested."""
    return shlex.quote(str(path))


def remove_unfinished(folder: Path) -> None:
    """Remove what a process that was killed while it wrote has left in a folder."""
    for path in folder.glob(f"*{_UNFINISHED}"):
        path.unlink(missing_ok=True)
