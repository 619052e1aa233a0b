"""The HDF5 files of test cases, truths and submissions: one dataset, `array`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from crevnet.data.errors import DataError, refuse_undamaged
from crevnet.data.files.days import DayFile
from crevnet.data.files.hdf5_reading import UNREADABLE, array_of, opened_file
from crevnet.data.files.hdf5_writing import writing_hdf5
from crevnet.data.files.protocol import Protocol
from crevnet.data.files.sealed import seal

_MARK = "held_out_from"


@contextmanager
def writing_array(path: Path, shape: tuple[int, ...], dtype: np.dtype | type = np.uint8) -> Iterator[h5py.Dataset]:
    """The dataset `array` of a new file, initially zeros: gzip 9, one chunk per case or frame.

    The file gets its name at the end.
    """
    with writing_hdf5(path) as file:
        array = file.create_dataset(
            "array",
            shape,
            dtype,
            chunks=(1, *shape[1:]),
            compression="gzip",
            compression_opts=9,
            fillvalue=0,
            fletcher32=True,
        )
        yield array
        seal(array)


@contextmanager
def reading_array(path: Path, expected: str) -> Iterator[h5py.Dataset]:
    """The dataset `array` of a file. A file that cannot be read raises DataError, which includes `expected`."""
    try:
        with opened_file(path) as file:
            yield array_of(file)
    except UNREADABLE as error:
        refuse_undamaged(str(path), error)
        raise DataError(f"{path} cannot be read ({' '.join(str(error).split())}); expected {expected}") from error


def check_channels(path: Path, channels: int, asked: Protocol) -> None:
    if channels != len(asked.channels):
        raise DataError(
            f"{path} has {channels} channels, expected {len(asked.channels)} in {asked.name}: check the folder and "
            "--data.protocol"
        )


def is_held_out(path: Path, origin: str) -> bool:
    """Whether the file exists, held out from the same days by the same draw, so an interrupted holdout can be repeated.

    Raises DataError if another file is at that path.
    """
    if not path.exists():
        return False
    with reading_array(path, "a file made by this command") as array:
        found = array.attrs.get(_MARK)
    if found != origin:
        raise exists_already(path)
    return True


def exists_already(path: Path) -> DataError:
    return DataError(f"{path} already exists and is not overwritten: choose another --out, or remove it")


@contextmanager
def holding_out(path: Path, shape: tuple[int, ...], origin: str) -> Iterator[h5py.Dataset]:
    """`writing_array` for a file that `is_held_out` recognizes."""
    with writing_array(path, shape) as array:
        array.attrs[_MARK] = origin
        yield array


def origin_of(days: Iterable[DayFile], drawn: object) -> str:
    """A hash that identifies held-out files: of the days' names, sizes and dates, and of the draw."""
    files = [(day.path.name, day.path.stat().st_size, day.path.stat().st_mtime_ns) for day in days]
    return hashlib.sha256(repr((files, drawn)).encode()).hexdigest()
