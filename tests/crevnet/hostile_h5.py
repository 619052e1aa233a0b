"""HDF5 files as a stranger may make them: each is written in the place of an honest one, whose array it is given."""

import os
import zlib
from pathlib import Path

import h5py
import numpy as np

SECRET = b"secret of the reader " * 1000


def _elsewhere(path: Path, name: str) -> Path:
    """A file of the reader's own, far from the hostile one."""
    return path.parents[3] / name


def _secret(path: Path) -> str:
    secret = _elsewhere(path, "secret.txt")
    secret.write_bytes(SECRET)
    return str(secret)


def virtual(file, path, good):
    layout = h5py.VirtualLayout(good.shape, good.dtype)
    layout[:] = h5py.VirtualSource("absent.h5", "array", good.shape)
    file.create_virtual_dataset("array", layout)


def virtual_of_one(file, path, good):
    """Kilobytes that take gigabytes: 200,000 pieces of a source."""
    layout = h5py.VirtualLayout((4000, *good.shape[1:]), good.dtype)
    source = h5py.VirtualSource(str(path), "source", good.shape[1:])
    for index in range(4000):
        layout[index] = source
    file.create_virtual_dataset("array", layout)


def external(file, path, good):
    file.create_dataset("array", good.shape, good.dtype, external=[(_secret(path), 0, h5py.h5f.UNLIMITED)])


def external_beside(file, path, good):
    """The frames are honest; a dataset beside them is not."""
    file["array"] = good
    file.create_dataset("more/secret", (20,), np.uint8, external=[(_secret(path), 0, h5py.h5f.UNLIMITED)])


def soft_link(file, path, good):
    file["other/values"] = good
    file["array"] = h5py.SoftLink("/other/values")


def external_link(file, path, good):
    other = _elsewhere(path, "other.hdf")
    with h5py.File(other, "w") as outside:
        outside["array"] = good
    file["array"] = h5py.ExternalLink(str(other), "/array")


def big_endian(file, path, good):
    file["array"] = good.astype(">i2")


def null_dataspace(file, path, good):
    file["array"] = h5py.Empty(good.dtype)


def group(file, path, good):
    file.create_group("array")


def text(file, path, good):
    file.create_dataset("array", data=["frames"] * len(good), dtype=h5py.string_dtype())


def compound(file, path, good):
    file["array"] = np.zeros(good.shape, [("volume", np.uint8), ("speed", np.uint8)])


def ragged(file, path, good):
    file.create_dataset("array", good.shape, h5py.vlen_dtype(np.uint8))


def never_written(file, path, good):
    """As three flipped bits make of an honest one."""
    file.create_dataset("array", good.shape, good.dtype)


def many_slots(file, path, good):
    array = file.create_dataset("array", (10**12, *good.shape[1:]), good.dtype, chunks=(1, *good.shape[1:]))
    array[0] = good[0]


def huge_slot(file, path, good):
    array = file.create_dataset("array", (*good.shape[:-1], 10**15), good.dtype, chunks=(*[1] * (good.ndim - 1), 2**20))
    array.id.write_direct_chunk((0,) * good.ndim, bytes(2**20))


def huge_chunk(file, path, good):
    array = file.create_dataset(
        "array", good.shape, good.dtype, maxshape=(None,) * good.ndim, chunks=(2**30, *[1] * (good.ndim - 1)),
        compression="gzip",
    )  # fmt: skip
    array.id.write_direct_chunk((0,) * good.ndim, zlib.compress(bytes(100)))


def chunk_bomb(file, path, good):
    """A chunk that goes on for as long as there is something of it."""
    _bomb(file, good, 100)


def small_chunk_bomb(file, path, good):
    """A chunk whose packed size is an honest one's."""
    _bomb(file, good, 5)


def _bomb(file, good, mebibytes):
    array = file.create_dataset("array", good.shape, good.dtype, chunks=good.shape, compression="gzip")
    packer = zlib.compressobj()
    packed = b"".join([*(packer.compress(bytes(2**20)) for _ in range(mebibytes)), packer.flush()])
    array.id.write_direct_chunk((0,) * good.ndim, packed)


def empty_chunk(file, path, good):
    """Of no byte, where HDF5 looks for a checksum."""
    array = file.create_dataset("array", good.shape, good.dtype, chunks=good.shape, compression="gzip", fletcher32=True)
    array.id.write_direct_chunk((0,) * good.ndim, b"\0")


def short_chunk(file, path, good):
    """As a flipped bit makes of a packed one, when it hides that there is a codec."""
    array = file.create_dataset("array", good.shape, good.dtype, chunks=good.shape)
    array.id.write_direct_chunk((0,) * good.ndim, bytes(10))


def packed_twice(file, path, good):
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk(good.shape)
    properties.set_deflate(9)
    properties.set_deflate(9)
    space, kind = h5py.h5s.create_simple(good.shape), h5py.h5t.py_create(good.dtype)
    h5py.h5d.create(file.id, b"array", kind, space, properties)
    file["array"][:] = good


def many_objects(file, path, good):
    for number in range(1500):
        file.create_group(f"a{number}")
    file["z"] = good


def deep_groups(file, path, good):
    """So many levels that a library that walks them by calling itself ends without its stack."""
    inner = file
    for _ in range(1200):
        inner = inner.create_group("a")
    inner["array"] = good


H5 = {
    virtual: "is virtual",
    virtual_of_one: "is virtual",
    external: "has external storage",
    soft_link: "is a link to another file or dataset",
    external_link: "is a link to another file or dataset",
    big_endian: "has dtype >i2, expected the byte order <i2",
    null_dataspace: "has a null dataspace",
    group: "no dataset",
    text: "has dtype object, expected numbers",
    compound: "expected numbers",
    ragged: "has dtype object, expected numbers",
    never_written: "has no stored values",
    many_slots: "expected at most 1000000 slots",
    huge_slot: "expected at most 1000000 slots",
    huge_chunk: "chunks (1073741824, 1",
    chunk_bomb: "bytes stored in",
    empty_chunk: "bytes stored in 1, expected",
    short_chunk: "bytes stored in 10, expected",
    packed_twice: "expected one codec",
    many_objects: "1501 objects",
    deep_groups: "more than 1000 objects",
}
"""How each is made, and what is said of it."""


def fifo(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


NO_FILES = {fifo: "is a named pipe, expected a regular file", device: "is a device, expected a regular file"}


def put(kind, path: Path) -> None:
    """Write a hostile file over an honest one that has a dataset `array`."""
    with h5py.File(path) as file:
        good = file["array"][()]
    path.unlink()
    if kind in NO_FILES:
        kind(path)
        return
    with h5py.File(path, "w") as file:
        kind(file, path, good)
