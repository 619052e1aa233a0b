"""Atomic file writing, checks before reading, and file names in messages and commands."""

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
    """A full disk, a quota or a limit on file sizes prevented writing a file.

    Args:
        error: the operating system's error.
        path: the file.
        size: a lower bound of the file's size, in bytes.
    """

    def __init__(self, error: OSError, path: Path, size: int) -> None:
        super().__init__(error.errno, error.strerror, str(path))
        lacking = max(size - shutil.disk_usage(path.parent).free, 1)
        self._remedy = {
            errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
            errno.EDQUOT: "raise your quota, or delete files that count towards it",
        }.get(error.errno or 0, f"free {-(-lacking // 2**20)} MiB or more")

    def __str__(self) -> str:
        return f"no space left for {self.filename} ({self.strerror}): {self._remedy}, or choose another folder"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to; the file is renamed to `path` once it is on the disk, and until then the old one stays.

    An error in the context also leaves the old file unchanged. Raises NoRoomError if the disk is full. A missing folder is
    created, and unfinished files of killed processes are removed from it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_unfinished_once(path.parent)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}{_UNFINISHED}")  # a different one in each process
    try:
        with _owned(unfinished) as file:
            yield unfinished
            os.fsync(file.fileno())
            os.replace(unfinished, path)
    except OSError as error:
        if error.errno in _FULL and not isinstance(error, NoRoomError):
            size = unfinished.stat().st_size if unfinished.exists() else 0
            unfinished.unlink(missing_ok=True)  # before NoRoomError counts the free space
            raise NoRoomError(error, path, size) from error
        raise
    finally:
        unfinished.unlink(missing_ok=True)


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replace `path` by a file that `write` writes, as in `replacing`. An OSError names `path`."""
    try:
        with replacing(path) as unfinished, unfinished.open("wb") as file:
            write(file)
    except NoRoomError:
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def check_regular(path: Path) -> None:
    """Raise ValueError unless `path` is a regular file. Opening a pipe or a device could block, or reading might never end.

    A symbolic link counts as the file that it leads to.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kind = next((kind for is_kind, kind in _KINDS.items() if is_kind(mode)), "not a file")
        raise ValueError(f"it is {kind}, expected a regular file: move it away")


_KINDS = {
    stat.S_ISDIR: "a folder",
    stat.S_ISFIFO: "a named pipe",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
    stat.S_ISSOCK: "a socket",
}


def read_text(path: Path, limit: int = 2**20) -> str:
    """A text file in UTF-8. ValueError if it is not a regular file, or has more than `limit` bytes."""
    check_regular(path)
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"it has more than {limit} bytes, expected a short text: check the path")
    return content.decode("utf-8")


def shown(name: str) -> str:
    """A name for figures and attributes, which are UTF-8; bytes that are not UTF-8 are escaped."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def quoted(path: Path) -> str:
    """A path, quoted for a shell, for commands in messages."""
    return shlex.quote(str(path))


def remove_unfinished(folder: Path) -> None:
    """Remove unfinished files of killed processes from a folder, but never those of running processes."""
    for path in folder.glob(f"*{_UNFINISHED}"):
        if _NAME.fullmatch(path.name) and path.is_file():
            _remove_if_abandoned(path)


_remove_unfinished_once = cache(remove_unfinished)
"""Called once per folder in each process: listing a folder of 10,000 videos for every write would take minutes."""


@contextmanager
def _owned(unfinished: Path) -> Iterator[BinaryIO]:
    """Create and lock the file. The lock ends with the process, so it distinguishes files in use from abandoned ones.

    It is a shared lock, with which HDF5 can still read the file.
    """
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
    except OSError:  # owned by another user, or already removed
        pass


def _locked(file: BinaryIO, exclusive: bool) -> bool | None:
    """Whether the lock was acquired; None on systems and file systems without such locks."""
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
    """Whether the file still has that name. A process that removes abandoned files may have removed it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
