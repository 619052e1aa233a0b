"""Files that are whole, whatever happens while they are written, and their names in commands."""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # not on Unix
    fcntl = None  # type: ignore[assignment]

_UNFINISHED = ".unfinished"
_NAME = re.compile(rf".+\.\d+{re.escape(_UNFINISHED)}")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class NoRoomError(OSError):
    """A file that a full disk, a quota or a limit on the size of files has cut short.

    Args:
        error: the operating system's.
        path: of the file.
        size: bytes that the file takes, at least.
    """

    def __init__(self, error: OSError, path: Path, size: int) -> None:
        super().__init__(error.errno, error.strerror, str(path))
        lacking = max(size - shutil.disk_usage(path.parent).free, 1)
        self._remedy = {
            errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
            errno.EDQUOT: "raise your quota, or free some of it",
        }.get(error.errno or 0, f"free {-(-lacking // 2**20)} MiB or more")

    def __str__(self) -> str:
        return f"no space left for {self.filename} ({self.strerror}): {self._remedy}, or choose another folder"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write a file to, which takes the place of `path` once it is on the disk: until then the old one stays.

    What is raised leaves the old file too: NoRoomError where the disk is full. The folder is made where it is missing, and
    rid of what killed processes have left unfinished in it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_unfinished_once(path.parent)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}{_UNFINISHED}")  # two runs never write the same one
    try:
        with _owned(unfinished) as file:
            yield unfinished
            os.fsync(file.fileno())
            os.replace(unfinished, path)
    except OSError as error:
        if error.errno in _FULL and not isinstance(error, NoRoomError):
            size = unfinished.stat().st_size if unfinished.exists() else 0
            unfinished.unlink(missing_ok=True)  # before what is free is counted
            raise NoRoomError(error, path, size) from error
        raise
    finally:
        unfinished.unlink(missing_ok=True)


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill the file that takes the place of `path`. An OSError names `path`."""
    try:
        with replacing(path) as unfinished, unfinished.open("wb") as file:
            write(file)
    except NoRoomError:
        raise
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
    """Remove what processes that were killed while they wrote have left in a folder; never what a living one writes."""
    for path in folder.glob(f"*{_UNFINISHED}"):
        if _NAME.fullmatch(path.name) and path.is_file():
            _remove_if_abandoned(path)


_remove_unfinished_once = cache(remove_unfinished)
"""Once in each folder that a process writes to: listing a folder of 10,000 movies for each of them would take minutes."""


@contextmanager
def _owned(unfinished: Path) -> Iterator[BinaryIO]:
    """The file, made and locked: the lock ends with the process, so that it tells a file that is written from one that was
    left. It is a shared one, beside which HDF5 can read the file."""
    while True:
        with unfinished.open("ab") as file:
            if _locked(file, exclusive=False) is not False and _is_at(file, unfinished):
                yield file
                return


def _remove_if_abandoned(path: Path) -> None:
    try:
        with path.open("ab") as file:
            if _locked(file, exclusive=True):
                path.unlink(missing_ok=True)
    except OSError:  # somebody else's, or gone
        pass


def _locked(file: BinaryIO, exclusive: bool) -> bool | None:
    """Whether the lock was to be had; None on systems and file systems that know no such locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether the file still has that name, which a process that removes what was left may have taken from it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
