"""The user's cache folder: what takes long to compute of day files, under names that follow from the files.

`$CREVNET_CACHE`, by default `~/.cache/crevnet`, with a folder for each kind. It only saves time: whoever writes there does
without where that is not possible.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from crevnet.data.days import DayFile
from crevnet.data.errors import DataError


def cache_path(kind: str, days: Sequence[DayFile], *options: object) -> Path:
    """Where what is computed of `days` with `options` is kept: another name once a file has changed."""
    files = []
    for day in days:
        try:
            status = day.path.stat()
        except OSError as error:
            raise DataError(f"{day.path} cannot be read ({error.strerror}); open the days again") from error
        files.append((str(day.path.resolve()), status.st_size, status.st_mtime_ns))
    key = hashlib.sha256(repr((files, *options)).encode()).hexdigest()
    return _folder() / kind / f"{key}.npy"


def _folder() -> Path:
    folder = os.environ.get("CREVNET_CACHE")
    if not folder:
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "crevnet")
    return Path(folder)
