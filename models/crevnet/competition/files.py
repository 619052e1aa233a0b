"""The HDF5 files of test cases, truths and submissions: one dataset, `array`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from crevnet.data import DataError
from crevnet.data.protocol import Protocol
from crevnet.data.safe_h5 import UNREADABLE, array_of, opened_file
from crevnet.data.sealed import seal
from crevnet.files import replacing


@contextmanager
def writing_array(path: Path, shape: tuple[int, ...], dtype: np.dtype | type = np.uint8) -> Iterator[h5py.Dataset]:
    """The dataset `array`, zeros at first, of a file that takes its name when it is finished: gzip 9, a chunk a case or frame."""
    with replacing(path) as partial, h5py.File(partial, "w") as file:
        array = file.create_dataset(
            "array", shape, dtype, chunks=(1, *shape[1:]), compression="gzip", compression_opts=9, fillvalue=0,
            fletcher32=True,
        )  # fmt: skip
        yield array
        seal(array)


@contextmanager
def reading_array(path: Path, expected: str) -> Iterator[h5py.Dataset]:
    """The dataset `array` of a file; `expected` says what should be there in the DataError for a file that cannot be read."""
    try:
        with opened_file(path) as file:
            yield array_of(file)
    except UNREADABLE as error:
        raise DataError(f"{path} cannot be read ({' '.join(str(error).split())}); expected {expected}") from error


def check_channels(path: Path, channels: int, asked: Protocol) -> None:
    if channels != len(asked.channels):
        raise DataError(
            f"{path} has {channels} channels, expected {len(asked.channels)} in {asked.name}: check folder and --data.protocol"
        )


def refuse_existing(path: Path) -> None:
    if path.exists():
        raise DataError(f"{path} exists already, and is not overwritten: choose another --out, or remove it")
