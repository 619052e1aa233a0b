"""The one door for HDF5 files, which may come from strangers: what a file declares is checked before any of its values are read.

All functions raise ValueError, which says what was found, what was expected and what to do; whoever calls names the file.

A path may be a symbolic link, since people keep day files on other disks; it must lead to a regular file. Links within an HDF5
file, virtual datasets and external storage are refused: each would make the file stand for any other file of the reader.
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
"""Of a dataset's values, unpacked. A day of 2021 has 0.5 GB, the largest file of test cases 2 GB."""
MAX_BYTES_AT_ONCE = 256 * 2**20
"""Of one slot or test case, and of one chunk."""
MAX_CHUNKS = 1_000_000
MAX_OBJECTS = 1000
"""Groups and datasets of a file."""

UNREADABLE = (OSError, KeyError, RuntimeError, ValueError, TypeError, zlib.error)
"""What h5py raises on damaged files, and this module on others."""

_UNPACKED = (h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32)
"""Filters that do not change how many bytes there are, or hardly."""


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
    """What a group holds, at most MAX_OBJECTS, none of it a link to elsewhere."""
    if len(group) > MAX_OBJECTS:
        raise ValueError(f"it holds {len(group)} objects, expected at most {MAX_OBJECTS}: write the frames alone")
    found = list(group)
    for name in found:
        kind = group.get(name, getlink=True)
        if not isinstance(kind, h5py.HardLink):
            raise ValueError(
                f"{name!r} is a link to another file or dataset, expected values of its own: write them into the file"
            )
    return found


def array_of(file: h5py.File) -> h5py.Dataset:
    """The dataset `array`, checked. ValueError where it is missing, or is no array of numbers with values of its own."""
    found = names(file)
    if "array" not in found or not isinstance(file["array"], h5py.Dataset):
        listed = ", ".join(map(ascii, found[:10]))
        raise ValueError(f"it has no dataset 'array', only {listed or 'nothing'}")
    check_dataset(file["array"])
    return file["array"]


def all_datasets(file: h5py.File) -> Iterator[h5py.Dataset]:
    """Every dataset, in groups too, with its storage checked. Groups that hold themselves are found by their number."""
    groups, seen = [file], 0
    while groups:
        group = groups.pop()
        for name in names(group):
            seen += 1
            if seen > MAX_OBJECTS:
                raise ValueError(f"it holds more than {MAX_OBJECTS} objects: write the frames alone")
            item = group[name]
            if isinstance(item, h5py.Group):
                groups.append(item)
            elif isinstance(item, h5py.Dataset):
                _check_storage(item)
                yield item


def check_dataset(dataset: h5py.Dataset) -> None:
    """Refuse what is no array of numbers of the machine's own byte order, within the limits, with values of its own."""
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
            f"and {MAX_BYTES_AT_ONCE} a slot: split it into several files"
        )
    if dataset.chunks is not None:
        _check_chunks(dataset, name)
    check_seal(dataset)
    if size and not dataset.id.get_storage_size():
        raise ValueError(f"dataset {name!r} holds no values, as if none was ever written; expected some")


def check_unpacked_sizes(dataset: h5py.Dataset) -> None:
    """Refuse gzip chunks that unpack to more than a chunk, as HDF5 would make room for all of it, and codecs of which that cannot
    be said. Reads every chunk."""
    codes = _filters(dataset)
    foreign = sorted({*codes} - {*_UNPACKED, h5py.h5z.FILTER_DEFLATE})
    if foreign:
        raise ValueError(f"it is packed by filters {foreign}, expected gzip or none: write it with gzip")
    if h5py.h5z.FILTER_DEFLATE not in codes:
        return
    skipped = 1 << codes.index(h5py.h5z.FILTER_DEFLATE)  # where a chunk would not get smaller
    most = _chunk_bytes(dataset) + 4  # a checksum may be packed too
    for chunk in _stored_chunks(dataset):
        if chunk.filter_mask & skipped:
            continue
        _, stored = dataset.id.read_direct_chunk(chunk.chunk_offset)
        if len(zlib.decompressobj().decompress(stored, most + 1)) > most:
            raise ValueError(f"a chunk of {len(stored)} bytes unpacks to more than {most} bytes: write it with gzip")


def _check_storage(dataset: h5py.Dataset) -> None:
    """Refuse values that lie in other files. Nothing of them has been opened so far."""
    properties, name = dataset.id.get_create_plist(), dataset.name.removeprefix("/")
    if properties.get_layout() == h5py.h5d.VIRTUAL:
        raise ValueError(
            f"dataset {name!r} is virtual, its values are those of other files; expected its own: copy them into it"
        )
    if properties.get_external_count():
        raise ValueError(
            f"dataset {name!r} has external storage, its values are the bytes of other files; expected its own: copy them "
            "into it"
        )


def _check_chunks(dataset: h5py.Dataset, name: str) -> None:
    filters = _filters(dataset)
    if len(filters) != len(set(filters)) or len({*filters} - {*_UNPACKED}) > 1:
        # Packed twice, a kilobyte unpacks to a gigabyte.
        raise ValueError(f"dataset {name!r} is packed by filters {filters}, expected one codec: write it with gzip")
    size = _chunk_bytes(dataset)
    count = math.prod(-(-held // chunk) for held, chunk in zip(dataset.shape, dataset.chunks, strict=True))
    if size > MAX_BYTES_AT_ONCE or count > MAX_CHUNKS:
        raise ValueError(
            f"dataset {name!r} has {count} chunks {dataset.chunks} of {size} bytes, expected at most {MAX_CHUNKS} of "
            f"{MAX_BYTES_AT_ONCE} bytes: write it with a chunk a slot"
        )
    # What cannot be packed gets hardly larger; a checksum, 4 bytes, may follow. HDF5 crashes where nothing stands before it.
    least, most = (5, size + size // 8 + 1024) if {*filters} - {*_UNPACKED} else (size, size + 4)
    wrong = next((chunk.size for chunk in _stored_chunks(dataset) if not least <= chunk.size <= most), None)
    if wrong is not None:
        raise ValueError(f"dataset {name!r} has a chunk of {size} bytes stored in {wrong}: write it anew")


def _filters(dataset: h5py.Dataset) -> list[int]:
    """Their codes, in the order in which they are applied to a chunk."""
    properties = dataset.id.get_create_plist()
    return [properties.get_filter(number)[0] for number in range(properties.get_nfilters())]


def _chunk_bytes(dataset: h5py.Dataset) -> int:
    """Of a chunk, unpacked."""
    size: int = dataset.dtype.itemsize * math.prod(dataset.chunks)
    return size


def _stored_chunks(dataset: h5py.Dataset) -> list[Any]:
    """h5py's StoreInfo of each chunk that was ever written."""
    found: list[Any] = []
    dataset.id.chunk_iter(found.append)
    return found
