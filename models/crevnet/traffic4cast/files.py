"""The HDF5 files of test cases, truths and submissions: one dataset, `array`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from crevnet.data import DataError, DayFile
from crevnet.data.errors import refuse_undamaged
from crevnet.data.files.hdf5_files import writing_hdf5
from crevnet.data.files.protocol import Protocol
from crevnet.data.files.safe_h5 import UNREADABLE, array_of, opened_file
from crevnet.data.files.sealed import seal

_MARK = "held_out_from"


@contextmanager
def writing_array(path: Path, shape: tuple[int, ...], dtype: np.dtype | type = np.uint8) -> Iterator[h5py.Dataset]:
    """The dataset `array`, zeros at first, of a file that takes its name when it is finished: gzip 9, a chunk a case or frame."""
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
    """The dataset `array` of a file; `expected` says what should be there in the DataError for a file that cannot be read."""
    try:
        with opened_file(path) as file:
            yield array_of(file)
    except UNREADABLE as error:
        refuse_undamaged(str(path), error)
        raise DataError(f"{path} cannot be read ({' '.join(str(error).split())}); expected {expected}") from error


def check_channels(path: Path, channels: int, asked: Protocol) -> None:
    if channels != len(asked.channels):
        raise DataError(
            f"{path} has {channels} channels, expected {len(asked.channels)} in {asked.name}: check folder and --data.protocol"
        )


def is_held_out(path: Path, origin: str) -> bool:
    """Whether the file is there already, held out from the same days by the same draw, so that a holdout that was killed can be
    repeated. DataError where something else is in its place."""
    if not path.exists():
        return False
    with reading_array(path, "a file that this command has made") as array:
        found = array.attrs.get(_MARK)
    if found != origin:
        raise exists_already(path)
    return True


def exists_already(path: Path) -> DataError:
    return DataError(f"{path} exists already, and is not overwritten: choose another --out, or remove it")


@contextmanager
def holding_out(path: Path, shape: tuple[int, ...], origin: str) -> Iterator[h5py.Dataset]:
    """`writing_array`, of a file that `is_held_out` recognizes."""
    with writing_array(path, shape) as array:
        array.attrs[_MARK] = origin
        yield array


def origin_of(days: Iterable[DayFile], drawn: object) -> str:
    """What determines held-out files: the days' names, sizes and dates, and what was drawn of them."""
    files = [(day.path.name, day.path.stat().st_size, day.path.stat().st_mtime_ns) for day in days]
    return hashlib.sha256(repr((files, drawn)).encode()).hexdigest()
