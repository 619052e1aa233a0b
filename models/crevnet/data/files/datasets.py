"""The dataset of frames in a day file: found, opened, checked and read, with errors that name the file.

`_first_dataset` finds it: the first dataset outside all groups, under any name. `hdf5_reading.py` contains the checks.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from crevnet.data.errors import DataError, refuse_undamaged
from crevnet.data.files.hdf5_reading import UNREADABLE, all_datasets, check_dataset, names, open_file
from crevnet.data.files.layouts import Layout
from crevnet.machine.files import check_regular


@contextmanager
def opened(path: Path) -> Iterator[h5py.Dataset]:
    """A file's first dataset, open within the context."""
    dataset = open_dataset(path)
    with dataset.file:
        yield dataset


def open_dataset(path: Path) -> h5py.Dataset:
    """A file's first dataset; the caller closes its file. DataError naming the file if it cannot be opened."""
    with naming(str(path)):
        if path.is_dir():
            raise DataError(f"{path} is a folder, expected an HDF5 file; move it away")
        check_regular(path)
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty (0 bytes), expected an HDF5 file; download it again or leave it out")
        return _first_dataset(open_file(path))


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Convert h5py's errors for damaged files into a DataError that begins with `what`."""
    try:
        yield
    except UNREADABLE as error:
        refuse_undamaged(what, error)
        raise DataError(
            f"{what} cannot be read ({one_line(error)}); download the file again or leave it out"
        ) from error


def read_slots(dataset: h5py.Dataset, start: int, stop: int, layout: Layout) -> np.ndarray:
    values: np.ndarray = dataset[start:stop]
    if values.dtype != np.uint8:
        largest = 1 if values.dtype.kind == "f" else 255
        if not (values.min() >= 0 and values.max() <= largest):  # also true for NaN
            raise layout.value_error(Path(dataset.file.filename), start, values, largest)
    return values


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _first_dataset(file: h5py.File) -> h5py.Dataset:
    """The first dataset outside all groups, under any name, checked."""
    for name in names(file):
        item = file[name]
        if isinstance(item, h5py.Dataset):
            check_dataset(item)
            _load_codecs(item)
            return item
    inside = next(all_datasets(file), None)
    if inside is not None:
        raise DataError(
            f"{file.filename} has datasets only in groups, such as {name_of(inside)}; expected the frames outside all groups: "
            "write them as 'array'"
        )
    raise DataError(f"{file.filename} has no dataset, expected one of frames; download it again or leave it out")


def name_of(dataset: h5py.Dataset) -> str:
    """The dataset's name, quoted, since a file may have several."""
    return repr(dataset.name.removeprefix("/"))


def _load_codecs(dataset: h5py.Dataset) -> None:
    """Import hdf5plugin if the dataset uses a codec that HDF5 does not include. Other files do not require it."""
    properties = dataset.id.get_create_plist()
    for number in range(properties.get_nfilters()):
        code, *_, name = properties.get_filter(number)
        if h5py.h5z.filter_avail(code):
            continue
        try:
            importlib.import_module("hdf5plugin")
        except ImportError as error:
            raise DataError(
                f"{dataset.file.filename} is compressed with {name.decode()}: pip install hdf5plugin to read it"
            ) from error
