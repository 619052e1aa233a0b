"""Rewrites files of frames for training: one frame per chunk, in a codec that is faster to read than gzip.

The competition's files of 2019 have chunks of 18 frames of a corner of one channel, so reading a window decompresses more than
the window. `bench/loading.py` measures the speed-up.
"""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from crevnet.data.errors import DataError
from crevnet.data.files.datasets import naming, opened
from crevnet.data.files.hdf5_reading import all_datasets
from crevnet.data.files.hdf5_writing import hdf5_in_memory
from crevnet.data.files.sealed import seal
from crevnet.data.made.made_files import text_attribute
from crevnet.machine.files import NoRoomError, replacing

_BLOCK = 36  # frames per copy: two of h5py's default chunks of 18
_MARK = "repacked_from"


def repack(source: Path, target: Path, progress: Callable[[float], None] | None = None) -> list[Path]:
    """Rewrite all HDF5 files below `source` under the same names below `target`; returns their paths.

    Files of frames (slots, H, W, C) keep their datasets, dtypes and attributes. Each written file is read again and its bytes
    are compared before it gets its name. Other files are copied. `progress` is called with the completed fraction, up to 1.
    Existing files are not written again, so an interrupted run can be repeated. Raises DataError for files that cannot be read
    or written, and for different files at the target paths.
    """
    codec = _codec()
    if target.resolve().is_relative_to(source.resolve()):
        raise DataError(f"{target} lies within {source}, the folder to repack: choose a target outside it")
    paths = sorted(_files(source))
    if not paths:
        raise DataError(f"{source} has no *.h5 file: check the path")
    sizes = [path.stat().st_size for path in paths]
    done = 0
    written = []
    for path, size in zip(paths, sizes, strict=True):
        copy = target / path.relative_to(source)
        for share in _repack_file(path, copy, codec):
            if progress is not None:
                progress((done + share * size) / sum(sizes))
        done += size
        written.append(copy)
    return written


def _codec() -> Any:
    """Zstandard: in `bench/loading.py` as small as gzip and as fast to read as LZ4, which takes 40 % more space."""
    try:
        import hdf5plugin
    except ImportError as error:
        raise DataError("repacking requires the package hdf5plugin: pip install hdf5plugin") from error
    return hdf5plugin.Zstd(clevel=3)


def _files(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise DataError(f"{folder} cannot be listed ({error}): check the path") from error

    for found, _, names in os.walk(folder, onerror=refuse, followlinks=True):
        yield from (Path(found, name) for name in names if name.endswith(".h5") and not name.startswith("."))


def _repack_file(path: Path, copy: Path, codec: Any) -> Iterator[float]:
    """Write one file, which gets its name once it is complete; yields the completed fraction."""
    with naming(str(path)), opened(path) as dataset:
        list(all_datasets(dataset.file))  # the others are also copied, so refuse links to other files
        is_frames = dataset.ndim == 4 and 0 not in dataset.shape
    if copy.exists():
        if not (_mark_of(copy) == _mark(path) if is_frames else filecmp.cmp(path, copy, shallow=False)):
            raise DataError(f"{copy} exists but is not {path} repacked: move it away, or choose another folder")
    elif is_frames:
        with _partial(copy) as partial:
            yield from _write(path, partial, codec)
    else:
        with _partial(copy) as partial:
            shutil.copyfile(path, partial)
    yield 1.0


def _write(path: Path, partial: Path, codec: Any) -> Iterator[float]:
    source_digest, digest = hashlib.blake2b(), hashlib.blake2b()
    with opened(path) as source, hdf5_in_memory(partial) as file:
        for name, item in source.file.items():
            if item != source:
                source.file.copy(item, file, name)
        target = file.create_dataset(
            source.name, source.shape, source.dtype, chunks=(1, *source.shape[1:]), **codec, fletcher32=True
        )
        with naming(f"{path}, attributes of its frames,"):
            target.attrs.update({**source.attrs, _MARK: _mark(path)})
        for start, values in _blocks(source):
            source_digest.update(values.data)
            target[start : start + len(values)] = values
            yield 0.9 * start / len(source)
        seal(target)
    with opened(partial) as written:
        for _, values in _blocks(written):
            digest.update(values.data)
    if digest.digest() != source_digest.digest():
        raise DataError(
            f"{partial} does not contain the values written from {path}: check the disk, and repeat the command"
        )


def _blocks(dataset: h5py.Dataset) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(dataset), _BLOCK):
        with naming(f"{dataset.file.filename}, slots from {start},"):
            values = dataset[start : start + _BLOCK]
        yield start, np.ascontiguousarray(values)


def _mark(path: Path) -> str:
    """The identity of the source file, stored in its copy."""
    status = path.stat()
    return json.dumps({"name": path.name, "bytes": status.st_size, "modified_ns": status.st_mtime_ns})


def _mark_of(copy: Path) -> str | None:
    with opened(copy) as dataset:
        return text_attribute(dataset, _MARK)


@contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """The path of an unfinished file, which is renamed to `path` if the context ends without an error."""
    try:
        with replacing(path) as partial:
            yield partial
    except NoRoomError:
        raise
    except (OSError, RuntimeError) as error:
        raise DataError(f"{path} cannot be written ({' '.join(str(error).split())}): choose another folder") from error
