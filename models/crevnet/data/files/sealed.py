"""A checksum of where a dataset's chunks are, kept with it as an attribute.

HDF5 checks the values of a chunk (fletcher32), but not the index that finds it: of a chunk that the index has lost, nothing but
zeros are read. The files that CrevNet writes are sealed, and their seals are checked when they are opened.
"""

from __future__ import annotations

import json
import zlib
from typing import Any

import h5py
import numpy as np

_SEAL = "chunk_index"


def seal(dataset: h5py.Dataset) -> None:
    """Call it once all values are written."""
    dataset.file.flush()
    dataset.attrs[_SEAL] = np.bytes_(json.dumps(_index(dataset)))


def check_seal(dataset: h5py.Dataset) -> None:
    """ValueError where the chunks are not those that were there when the dataset was sealed. Most files have no seal.

    Other programs copy attributes when they write a file anew: with other chunks, or with more of them, it has no seal.
    """
    if _SEAL not in dataset.attrs or dataset.chunks is None:
        return
    index = _index(dataset)
    try:
        sealed = json.loads(_fixed_text(dataset))
        is_other = sealed["chunks"] != index["chunks"] or index["count"] > sealed["count"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"its attribute {_SEAL!r} is not as it was written: the file is damaged") from error
    if not is_other and sealed != index:
        raise ValueError(
            f"its chunks are not those that were written, {index['count']} of {sealed['count']} are there: the file is damaged"
        )


def _fixed_text(dataset: h5py.Dataset) -> bytes:
    """The seal, of a length that its type says: HDF5 may search a damaged file for ever for text of any length."""
    kind = dataset.attrs.get_id(_SEAL)
    if kind.shape != () or kind.dtype.kind != "S":
        raise TypeError(f"{kind.dtype} {kind.shape}")
    return bytes(dataset.attrs[_SEAL])


def _index(dataset: h5py.Dataset) -> dict[str, Any]:
    places: list[tuple[int, ...]] = []
    dataset.id.chunk_iter(lambda chunk: places.append(chunk.chunk_offset))
    described = (dataset.shape, dataset.dtype.str, dataset.fillvalue.item(), sorted(places))
    return {"chunks": list(dataset.chunks), "count": len(places), "crc32": zlib.crc32(repr(described).encode())}
