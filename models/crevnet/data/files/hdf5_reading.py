"""Checked reading of HDF5 files, which may be untrusted: a file's declarations are checked before any of its values are read.

All code that reads HDF5 files opens them here. `hdf5_writing.py` writes them.

- Day files: `datasets.py` finds the frames. It takes the first dataset outside all groups, under any name.
- Test cases, submissions and generated files: `array_of` takes only the dataset `array`.

All functions raise ValueError with the value found, the value expected and the remedy; the caller adds the file's name.

A path may be a symbolic link, since day files are often on other disks; it must lead to a regular file. Links within an HDF5
file, virtual datasets and external storage are refused: through each, a file could expose any other file of the user.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import h5py

from crevnet.data.files.sealed import check_seal
from crevnet.machine.files import check_regular

MAX_SLOTS = 1_000_000
MAX_BYTES = 64 * 2**30
"""Largest size of a dataset's values, uncompressed. A day of 2021 has 0.5 GB, the largest file of test cases 2 GB."""
MAX_BYTES_AT_ONCE = 256 * 2**20
"""Largest size of one slot or test case, and of one chunk."""
MAX_CHUNKS = 1_000_000
MAX_OBJECTS = 1000
"""Largest number of groups and datasets in a file."""

UNREADABLE = (OSError, KeyError, RuntimeError, ValueError, TypeError, zlib.error)
"""Errors that h5py raises for damaged files, and this module for unacceptable ones."""

_UNPACKED = (h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32)
"""Filters that do not change the number of bytes, or add only a checksum."""


@contextmanager
def opened_file(source: Path | BinaryIO) -> Iterator[h5py.File]:
    """An HDF5 file, open within the context."""
    with open_file(source) as file:
        yield file


def open_file(source: Path | BinaryIO) -> h5py.File:
    """An HDF5 file, which the caller closes."""
    if isinstance(source, Path):
        check_regular(source)
    return h5py.File(source, "r")


def names(group: h5py.Group) -> list[str]:
    """The names in a group. ValueError for more than MAX_OBJECTS of them, and for links to elsewhere."""
    if len(group) > MAX_OBJECTS:
        raise ValueError(f"it has {len(group)} objects, expected at most {MAX_OBJECTS}: write only the frames")
    found = list(group)
    for name in found:
        kind = group.get(name, getlink=True)
        if not isinstance(kind, h5py.HardLink):
            raise ValueError(
                f"{name!r} is a link to another file or dataset, expected values in the file: write them into the file"
            )
    return found


def array_of(file: h5py.File) -> h5py.Dataset:
    """The dataset `array`, checked. ValueError if it is missing, or if `check_dataset` refuses it."""
    found = names(file)
    if "array" not in found or not isinstance(file["array"], h5py.Dataset):
        listed = ", ".join(map(ascii, found[:10]))
        raise ValueError(f"it has no dataset 'array', only {listed or 'nothing'}")
    check_dataset(file["array"])
    return file["array"]


def all_datasets(file: h5py.File) -> Iterator[h5py.Dataset]:
    """Every dataset, including those in groups, with its storage checked.

    The limit on objects also ends the search in groups that contain themselves.
    """
    groups, seen = [file], 0
    while groups:
        group = groups.pop()
        for name in names(group):
            seen += 1
            if seen > MAX_OBJECTS:
                raise ValueError(f"it has more than {MAX_OBJECTS} objects: write only the frames")
            item = group[name]
            if isinstance(item, h5py.Group):
                groups.append(item)
            elif isinstance(item, h5py.Dataset):
                _check_storage(item)
                yield item


def check_dataset(dataset: h5py.Dataset) -> None:
    """ValueError unless the dataset is an array of numbers in native byte order, within the limits, stored in the file."""
    _check_storage(dataset)
    name = dataset.name.removeprefix("/")
    if dataset.id.get_space().get_simple_extent_type() == h5py.h5s.NULL:
        raise ValueError(f"dataset {name!r} has a null dataspace, expected an array: write values into it")
    dtype = dataset.dtype
    if dtype.kind not in "uif":
        raise ValueError(f"dataset {name!r} has dtype {dtype}, expected numbers: convert it to uint8")
    if not dtype.isnative:
        raise ValueError(
            f"dataset {name!r} has dtype {dtype.str}, expected the byte order {dtype.newbyteorder('=').str}: convert it to "
            "uint8, or to that byte order"
        )
    size = dtype.itemsize * math.prod(dataset.shape)
    most = min(MAX_BYTES, MAX_BYTES_AT_ONCE * dataset.shape[0]) if dataset.ndim else MAX_BYTES_AT_ONCE
    if size > most or (dataset.ndim and dataset.shape[0] > MAX_SLOTS):
        raise ValueError(
            f"dataset {name!r} has shape {dataset.shape}, {size} bytes; expected at most {MAX_SLOTS} slots, {MAX_BYTES} bytes, "
            f"and {MAX_BYTES_AT_ONCE} per slot: split it into several files"
        )
    if dataset.chunks is not None:
        _check_chunks(dataset, name)
    check_seal(dataset)
    if size and not dataset.id.get_storage_size():
        raise ValueError(f"dataset {name!r} has no stored values, expected {size} bytes: write its values")


def check_unpacked_sizes(dataset: h5py.Dataset) -> None:
    """ValueError if a gzip chunk decompresses to more than a chunk, for which HDF5 would allocate memory. Reads every chunk.

    Also refuses other codecs, for which this cannot be checked.
    """
    codes = _filters(dataset)
    foreign = sorted({*codes} - {*_UNPACKED, h5py.h5z.FILTER_DEFLATE})
    if foreign:
        raise ValueError(f"it is compressed by filters {foreign}, expected gzip or none: write it with gzip")
    if h5py.h5z.FILTER_DEFLATE not in codes:
        return
    skipped = 1 << codes.index(h5py.h5z.FILTER_DEFLATE)  # set for a chunk that compression would not shrink
    most = _chunk_bytes(dataset) + 4  # a checksum may be compressed with it
    for chunk in _stored_chunks(dataset):
        if chunk.filter_mask & skipped:
            continue
        _, stored = dataset.id.read_direct_chunk(chunk.chunk_offset)
        if len(zlib.decompressobj().decompress(stored, most + 1)) > most:
            raise ValueError(
                f"a chunk of {len(stored)} bytes decompresses to more than {most} bytes: write it with gzip"
            )


def _check_storage(dataset: h5py.Dataset) -> None:
    """ValueError for values that are in other files, none of which has been opened yet."""
    properties, name = dataset.id.get_create_plist(), dataset.name.removeprefix("/")
    if properties.get_layout() == h5py.h5d.VIRTUAL:
        raise ValueError(
            f"dataset {name!r} is virtual, with values from other files; expected values in the file: copy them into it"
        )
    if properties.get_external_count():
        raise ValueError(
            f"dataset {name!r} has external storage, with values from other files; expected values in the file: copy them "
            "into it"
        )


def _check_chunks(dataset: h5py.Dataset, name: str) -> None:
    filters = _filters(dataset)
    if len(filters) != len(set(filters)) or len({*filters} - {*_UNPACKED}) > 1:
        # Compressed twice, a kilobyte expands to a gigabyte.
        raise ValueError(f"dataset {name!r} is compressed by filters {filters}, expected one codec: write it with gzip")
    size = _chunk_bytes(dataset)
    count = math.prod(-(-held // chunk) for held, chunk in zip(dataset.shape, dataset.chunks, strict=True))
    if size > MAX_BYTES_AT_ONCE or count > MAX_CHUNKS:
        raise ValueError(
            f"dataset {name!r} has {count} chunks {dataset.chunks} of {size} bytes, expected at most {MAX_CHUNKS} of "
            f"{MAX_BYTES_AT_ONCE} bytes: write it with one chunk per slot"
        )
    # Incompressible data grow only slightly. A checksum of 4 bytes may follow; HDF5 crashes if no data precede it.
    least, most = (5, size + size // 8 + 1024) if {*filters} - {*_UNPACKED} else (size, size + 4)
    wrong = next((chunk.size for chunk in _stored_chunks(dataset) if not least <= chunk.size <= most), None)
    if wrong is not None:
        raise ValueError(
            f"dataset {name!r} has a chunk of {size} bytes stored in {wrong}, expected {least} to {most}: write it again"
        )


def _filters(dataset: h5py.Dataset) -> list[int]:
    """Codes of the dataset's filters, in the order in which they are applied to a chunk."""
    properties = dataset.id.get_create_plist()
    return [properties.get_filter(number)[0] for number in range(properties.get_nfilters())]


def _chunk_bytes(dataset: h5py.Dataset) -> int:
    """The size of an uncompressed chunk."""
    size: int = dataset.dtype.itemsize * math.prod(dataset.chunks)
    return size


def _stored_chunks(dataset: h5py.Dataset) -> list[Any]:
    """h5py's StoreInfo of each chunk in the file."""
    found: list[Any] = []
    dataset.id.chunk_iter(found.append)
    return found
