"""Files of frames rewritten for training: a chunk holds one frame, in a codec that is faster to read than gzip.

The competition's files of 2019 have chunks that gather 18 frames of a corner of one channel, so that a window decompresses more
than it holds. `bench/loading.py` measures what rewriting gains.
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
from crevnet.data.files.days import naming, opened
from crevnet.data.files.hdf5_files import hdf5_in_memory
from crevnet.data.files.safe_h5 import all_datasets
from crevnet.data.files.sealed import seal
from crevnet.data.made.made_files import text_attribute
from crevnet.machine.files import NoRoomError, replacing

_BLOCK = 36  # frames that are copied at once: two of h5py's own chunks of 18
_MARK = "repacked_from"


def repack(source: Path, target: Path, progress: Callable[[float], None] | None = None) -> list[Path]:
    """Rewrite all HDF5 files below `source` under the same names below `target`; returns their paths.

    Files of frames (slots, H, W, C) keep their datasets, dtypes and attributes, and what is written is read again and compared,
    byte by byte, before it gets its name. Other files are copied. `progress` is called with the share of the work that is done,
    up to 1. Files that are there already are kept, so an interrupted run can be repeated. Raises DataError for files that cannot
    be read or written, and for others in the place of theirs.
    """
    codec = _codec()
    if target.resolve().is_relative_to(source.resolve()):
        raise DataError(f"{target} lies within {source}, whose files are to be repacked: choose another folder")
    paths = sorted(_files(source))
    if not paths:
        raise DataError(f"{source} holds no file *.h5: check the path")
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
    """Zstandard: by `bench/loading.py` as small as gzip, and read as fast as LZ4, which takes 40 % more room."""
    try:
        import hdf5plugin
    except ImportError as error:
        raise DataError("repacking needs the package hdf5plugin: pip install hdf5plugin") from error
    return hdf5plugin.Zstd(clevel=3)


def _files(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise DataError(f"{folder} cannot be listed ({error}): check the path") from error

    for found, _, names in os.walk(folder, onerror=refuse, followlinks=True):
        yield from (Path(found, name) for name in names if name.endswith(".h5") and not name.startswith("."))


def _repack_file(path: Path, copy: Path, codec: Any) -> Iterator[float]:
    """Write one file under its name once it is complete; yields the share that is done."""
    with naming(str(path)), opened(path) as dataset:
        list(all_datasets(dataset.file))  # the others are copied too, and nothing from elsewhere with them
        is_frames = dataset.ndim == 4 and 0 not in dataset.shape
    if copy.exists():
        if not (_mark_of(copy) == _mark(path) if is_frames else filecmp.cmp(path, copy, shallow=False)):
            raise DataError(f"{copy} exists, and is not {path} repacked: move it away, or choose another folder")
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
            source_digest.update(values)
            target[start : start + len(values)] = values
            yield 0.9 * start / len(source)
        seal(target)
    with opened(partial) as written:
        for _, values in _blocks(written):
            digest.update(values)
    if digest.digest() != source_digest.digest():
        raise DataError(f"{partial} does not hold what was written of {path}: check the disk, and repeat")


def _blocks(dataset: h5py.Dataset) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(dataset), _BLOCK):
        with naming(f"{dataset.file.filename}, slots from {start},"):
            values = dataset[start : start + _BLOCK]
        yield start, np.ascontiguousarray(values)


def _mark(path: Path) -> str:
    """Which file that was."""
    status = path.stat()
    return json.dumps({"name": path.name, "bytes": status.st_size, "modified_ns": status.st_mtime_ns})


def _mark_of(copy: Path) -> str | None:
    with opened(copy) as dataset:
        return text_attribute(dataset, _MARK)


@contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """A place for a file that is not whole yet, which becomes `path` where the context ends without an error."""
    try:
        with replacing(path) as partial:
            yield partial
    except NoRoomError:
        raise
    except (OSError, RuntimeError) as error:
        raise DataError(f"{path} cannot be written ({' '.join(str(error).split())}): choose another folder") from error
