"""HDF5 files that are whole or not there: all that CrevNet writes are written here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py

from crevnet.machine.files import replacing


@contextmanager
def writing_hdf5(path: Path) -> Iterator[h5py.File]:
    """An HDF5 file to fill in, which takes the place of `path` when it is whole.

    OSError, before anything is filled in, for a folder that cannot be written to; NoRoomError if the disk is full at the end.
    """
    with replacing(path) as unfinished, hdf5_in_memory(unfinished) as file:
        yield file


@contextmanager
def hdf5_in_memory(unfinished: Path) -> Iterator[h5py.File]:
    """An HDF5 file to fill in, put together in memory and written at the end: the HDF5 library crashes if a disk is full.

    It takes memory for twice the size that it will have on the disk, compressed.
    """
    with unfinished.open("wb", buffering=0) as target:
        with h5py.File(unfinished, "w", driver="core", backing_store=False) as file:
            yield file
            file.flush()
            image = memoryview(file.id.get_file_image())
        target.truncate(len(image))  # its size, by which `replacing` says how much to free
        while image:
            image = image[target.write(image) :]  # the system writes at most 2 GiB at once
