"""The user's cache folder: what takes long to compute of day files, under names that follow from the files.

`$CREVNET_CACHE`, by default `~/.cache/crevnet`, with a folder for each kind. It only saves time: whoever writes there does
without where that is not possible.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

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


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` once it is written, so that no reader ever meets half of it. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as file:
        try:
            yield file
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _folder() -> Path:
    folder = os.environ.get("CREVNET_CACHE")
    if not folder:
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "crevnet")
    return Path(folder)
