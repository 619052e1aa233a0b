"""Writes all HDF5 files of CrevNet atomically: a file is either complete or does not exist."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py

from crevnet.machine.files import replacing


@contextmanager
def writing_hdf5(path: Path) -> Iterator[h5py.File]:
    """An HDF5 file to fill in, which replaces `path` once it is complete.

    Raises OSError at the start if the folder is not writable, and NoRoomError at the end if the disk is full.
    """
    with replacing(path) as unfinished, hdf5_in_memory(unfinished) as file:
        yield file


@contextmanager
def hdf5_in_memory(unfinished: Path) -> Iterator[h5py.File]:
    """An HDF5 file to fill in, assembled in memory and written at the end, because the HDF5 library crashes on a full disk.

    It takes twice as much memory as the compressed file takes disk space.
    """
    with unfinished.open("wb", buffering=0) as target:
        with h5py.File(unfinished, "w", driver="core", backing_store=False) as file:
            yield file
            file.flush()
            image = memoryview(file.id.get_file_image())
        target.truncate(len(image))  # the full size, from which `replacing` computes the space to free
        while image:
            image = image[target.write(image) :]  # the system writes at most 2 GiB at once
