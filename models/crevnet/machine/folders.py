"""Creates and locks the folders that commands write to."""

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
    """Create the folder if it is missing. SettingsError if that fails, for example because a file has its name."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(folder, error) from error


@contextmanager
def only_process(run: Path) -> Iterator[None]:
    """Lock a run's folder, which is created if it is missing. SettingsError if another process has locked it.

    The lock ends with the process, even if it is killed. On systems and file systems without such locks, nothing is locked or
    refused. The lock is a file that is never written to or truncated, so any other file with its name is left unchanged.
    """
    make_folder(run)
    path = run / "training.lock"
    with _lock_file(path) as file:
        try:
            # Unlike flock's, this lock is not inherited by workers, which outlive a killed process by seconds.
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise _held(run) from error
        except OSError:
            pass
        if not (path.exists() and os.path.samestat(os.fstat(file.fileno()), path.lstat())):
            raise _held(run)  # the process that held it removed the file after it was opened here
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _lock_file(path: Path) -> BinaryIO:
    """Open the lock's file, or create it. SettingsError if the path is not a regular file, for example a symbolic link."""
    # O_NONBLOCK, because opening a pipe would wait for a reader.
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        file = os.fdopen(os.open(path, flags, 0o666), "rb")
    except OSError as error:
        if path.is_symlink():
            raise _no_lock(path, "a symbolic link") from error
        if path.exists() and not path.is_file():
            raise _no_lock(path, "not a regular file") from error
        raise _unusable(path.parent, error) from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise _no_lock(path, "not a regular file")
    return file


def _no_lock(path: Path, kind: str) -> SettingsError:
    return SettingsError(
        f"{path} is {kind}, expected a regular file, the lock of a training run: remove it, or choose another --out"
    )


def _held(run: Path) -> SettingsError:
    return SettingsError(
        f"{run} is in use: another process is training in it; wait until it ends, or choose another --out"
    )


def _unusable(folder: Path, error: OSError) -> SettingsError:
    return SettingsError(f"{folder} is not a writable folder ({error.strerror}): choose another --out")
