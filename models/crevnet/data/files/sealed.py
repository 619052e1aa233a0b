"""Seals: a checksum of the list of a dataset's chunks, stored as its attribute.

HDF5 checks the values of a chunk (fletcher32), but not the index that locates it: a chunk that is missing from the index reads
as zeros. CrevNet seals the files that it writes, and checks the seals when it opens them.
"""

from __future__ import annotations

import json
import zlib
from typing import Any

import h5py
import numpy as np

_SEAL = "chunk_index"


def seal(dataset: h5py.Dataset) -> None:
    """Write the dataset's seal. Call this after all values are written."""
    dataset.file.flush()
    dataset.attrs[_SEAL] = np.bytes_(json.dumps(_index(dataset)))


def check_seal(dataset: h5py.Dataset) -> None:
    """ValueError if the chunks differ from those at the time of sealing. A dataset without a seal passes.

    Other programs copy attributes when they rewrite a file. A seal for other chunks, or for fewer chunks, is ignored.
    """
    if _SEAL not in dataset.attrs or dataset.chunks is None:
        return
    index = _index(dataset)
    try:
        sealed = json.loads(_fixed_text(dataset))
        is_other = sealed["chunks"] != index["chunks"] or index["count"] > sealed["count"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"its attribute {_SEAL!r} is not readable: the file is damaged") from error
    if not is_other and sealed != index:
        raise ValueError(
            f"its chunks are not those that were written, {index['count']} of {sealed['count']} are left: the file is damaged"
        )


def _fixed_text(dataset: h5py.Dataset) -> bytes:
    """The seal, whose dtype has a fixed length: HDF5 may loop forever over variable-length text in a damaged file."""
    kind = dataset.attrs.get_id(_SEAL)
    if kind.shape != () or kind.dtype.kind != "S":
        raise TypeError(f"{kind.dtype} {kind.shape}")
    return bytes(dataset.attrs[_SEAL])


def _index(dataset: h5py.Dataset) -> dict[str, Any]:
    places: list[tuple[int, ...]] = []
    dataset.id.chunk_iter(lambda chunk: places.append(chunk.chunk_offset))
    described = (dataset.shape, dataset.dtype.str, dataset.fillvalue.item(), sorted(places))
    return {"chunks": list(dataset.chunks), "count": len(places), "crc32": zlib.crc32(repr(described).encode())}
