"""Folders that commands write to."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from crevnet.machine.errors import SettingsError

try:
    import fcntl
except ImportError:  # not on Unix
    fcntl = None  # type: ignore[assignment]


def make_folder(folder: Path) -> None:
    """Make it where it is missing. SettingsError where that cannot be, since a file is in its place, say."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(folder, error) from error


@contextmanager
def only_process(run: Path) -> Iterator[None]:
    """Hold a run's folder, which is made where it is missing: SettingsError where another process holds it.

    A killed process holds it no longer. On systems and file systems that know no such locks, nothing is held and nothing refused.
    The lock is a file that nothing is ever written to or cut off from: whatever else has its name stays as it is.
    """
    make_folder(run)
    path = run / "training.lock"
    with _lock_file(path) as file:
        try:
            # Unlike flock's, this lock does not pass to the processes that read data, which outlive a killed one by seconds.
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise _held(run) from error
        except OSError:
            pass
        if not (path.exists() and os.path.samestat(os.fstat(file.fileno()), path.lstat())):
            raise _held(run)  # it was removed, by the process that held it, after it was opened here
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _lock_file(path: Path) -> BinaryIO:
    """The lock's file, made where it is missing. SettingsError where something else is in its place: a link, say, that leads to
    another file."""
    # O_NONBLOCK, since a pipe would wait for a reader.
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        file = os.fdopen(os.open(path, flags, 0o666), "rb")
    except OSError as error:
        if path.is_symlink():
            raise _no_lock(path, "a symbolic link") from error
        if path.exists() and not path.is_file():
            raise _no_lock(path, "no regular file") from error
        raise _unusable(path.parent, error) from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise _no_lock(path, "no regular file")
    return file


def _no_lock(path: Path, kind: str) -> SettingsError:
    return SettingsError(
        f"{path} is {kind}, expected the lock of a training run, a regular file: remove it, or choose another --out"
    )


def _held(run: Path) -> SettingsError:
    return SettingsError(
        f"{run} is being trained in by another process: wait until it has ended, or choose another --out"
    )


def _unusable(folder: Path, error: OSError) -> SettingsError:
    return SettingsError(f"{folder} is no folder that can be written to ({error.strerror}): choose another --out")
