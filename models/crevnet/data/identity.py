"""The files that a run was trained on: names, sizes and dates, by which a resumed run detects changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path

from crevnet.data.errors import DataError

Identity = dict[str, list[int]]
"""A file's path below the data folder -> its size in bytes and the time of its last change in nanoseconds."""


def identity(root: Path, paths: Iterable[Path]) -> Identity:
    """The identity of these files, which are below `root`; DataError if one is missing."""
    found = {}
    for path in sorted(paths):
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}): check the data folder") from error
        found[path.relative_to(root).as_posix()] = [status.st_size, status.st_mtime_ns]
    return found


def difference(before: Mapping[str, list[int]], now: Mapping[str, list[int]]) -> str | None:
    """The first file that differs, how it differs, and the number of such files; None if there are none."""
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if not names:
        return None
    first = names[0]
    others = "" if len(names) == 1 else f" ({len(names)} files differ in all)"
    return f"{first} {_written(now.get(first))}, and {_written(before.get(first))} in the run so far{others}"


def _written(file: list[int] | None) -> str:
    if file is None:
        return "was not used"
    size, changed = file
    return f"had {size} bytes of {datetime.fromtimestamp(changed / 1e9):%Y-%m-%d %H:%M:%S}"
