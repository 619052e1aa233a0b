"""The user's cache folder: slow results computed from day files, stored under names that derive from those files.

The folder is `$CREVNET_CACHE`, by default `~/.cache/crevnet`, with a subfolder for each kind of result. It only saves time:
callers continue without it if it cannot be written.
"""

import hashlib
import io
import math
import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crevnet.data.errors import DataError
from crevnet.data.files.days import DayFile
from crevnet.machine.files import replacing


def cache_path(kind: str, days: Sequence[DayFile], *options: object) -> Path:
    """The path of the result of kind `kind` for `days` and `options`; it differs once a file changes.

    Raises DataError if a file no longer exists.
    """
    files = []
    for day in days:
        try:
            status = day.path.stat()
        except OSError as error:
            raise DataError(f"{day.path} cannot be read ({error.strerror}); open the days again") from error
        files.append((str(day.path.resolve()), status.st_size, status.st_mtime_ns))
    key = hashlib.sha256(repr((files, *options)).encode()).hexdigest()
    return _folder() / kind / f"{key}.npy"


def write_cached(path: Path, blocks: Iterable[NDArray[Any]], shape: tuple[int, ...]) -> None:
    """Write an array of values in [0, 1] as .npy, from blocks of its first axis, followed by a checksum. Raises OSError."""
    checksum, begun = 0, False
    with replacing(path) as unfinished, unfinished.open("wb") as file:
        for block in blocks:
            if not begun:
                file.write(_header(shape, block.dtype))
                begun = True
            content = block.tobytes()
            checksum = zlib.crc32(content, checksum)
            file.write(content)
        file.write(checksum.to_bytes(4, "little"))


def read_cached(path: Path, shape: tuple[int, ...], dtype: type[np.floating]) -> NDArray[Any] | None:
    """The array that `write_cached` wrote, read-only; None if the file is missing or differs from what was written.

    The header is compared, not parsed, so nothing in it is trusted. The whole file is read once, for the checksum.
    """
    header, size = _header(shape, np.dtype(dtype)), math.prod(shape) * np.dtype(dtype).itemsize
    try:
        if path.stat().st_size != len(header) + size + 4:  # which also excludes pipes and devices
            return None
        with path.open("rb") as file:
            if file.read(len(header)) != header:
                return None
        content = np.memmap(path, np.uint8, "r", offset=len(header))
    except (OSError, ValueError):
        return None
    array: NDArray[Any] = content[:-4].view(dtype).reshape(shape)
    bits = array.view(f"u{array.itemsize}")  # ordered like the floats from 0 to 1; all others, and NaN, are above
    one = np.ones((), dtype).view(bits.dtype)
    is_whole = zlib.crc32(content[:-4]) == int.from_bytes(content[-4:].tobytes(), "little")
    return array if is_whole and (bits.max(initial=0) <= one) else None


def _header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    written = io.BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(written, description)
    return written.getvalue()


def _folder() -> Path:
    folder = os.environ.get("CREVNET_CACHE")
    if not folder:
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "crevnet")
    return Path(folder)
