"""Files of frames that a command creates: complete or absent, and never written over another file."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from crevnet.data.errors import DataError, refuse_undamaged
from crevnet.data.files.hdf5_reading import UNREADABLE, array_of, opened_file
from crevnet.data.files.hdf5_writing import writing_hdf5
from crevnet.data.files.sealed import seal
from crevnet.machine.files import NoRoomError


def is_made(path: Path, mark: str, origin: str) -> bool:
    """Whether the file exists and was made by the same command from the same `origin`, which its attribute `mark` stores.

    Raises DataError if something else is at that path.
    """
    if not path.exists():
        return False
    try:
        with opened_file(path) as file:
            found = text_attribute(array_of(file), mark)
    except UNREADABLE as error:
        refuse_undamaged(str(path), error)
        raise DataError(f"{path} exists, but was not made by this command; choose another folder or name") from error
    if found != origin:
        raise DataError(f"{path} exists, made from {found}, expected {origin}; choose another folder, name or seed")
    return True


@contextmanager
def making(path: Path, shape: tuple[int, ...], mark: str, origin: str, chunk: int = 1) -> Iterator[h5py.Dataset]:
    """An empty dataset (slots, H, W, C) uint8 to fill in, with `chunk` frames per chunk; the file gets its name at the end.

    Raises DataError if it cannot be written, and NoRoomError if the disk is full.
    """
    try:
        with writing_hdf5(path) as file:
            array = file.create_dataset(
                "array", shape, np.uint8, chunks=(chunk, *shape[1:]), compression="gzip", fletcher32=True
            )
            array.attrs[mark] = origin
            yield array
            seal(array)
    except NoRoomError:
        raise
    except OSError as error:
        raise DataError(f"{path} cannot be written ({' '.join(str(error).split())}); choose another folder") from error


def text_attribute(dataset: h5py.Dataset, name: str) -> str | None:
    """The attribute `name` of a dataset; None if it is missing or not a string."""
    if name not in dataset.attrs:
        return None
    attribute = dataset.attrs.get_id(name)
    if attribute.shape != () or h5py.check_string_dtype(attribute.dtype) is None:
        return None
    found = dataset.attrs[name]
    return found if isinstance(found, str) else None
