"""Folders that commands write to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from crevnet.settings_error import SettingsError

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
    """
    make_folder(run)
    path = run / "training.lock"
    try:
        file = path.open("w")
    except OSError as error:
        raise _unusable(run, error) from error
    with file:
        try:
            # Unlike flock's, this lock does not pass to the processes that read data, which outlive a killed one by seconds.
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise _held(run) from error
        except OSError:
            pass
        if not (path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())):
            raise _held(run)  # it was removed, by the process that held it, after it was opened here
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _held(run: Path) -> SettingsError:
    return SettingsError(
        f"{run} is being trained in by another process: wait until it has ended, or choose another --out"
    )


def _unusable(folder: Path, error: OSError) -> SettingsError:
    return SettingsError(f"{folder} is no folder that can be written to ({error.strerror}): choose another --out")
