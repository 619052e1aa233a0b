"""The system's page cache: drop a file from it, and check that this worked."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
from pathlib import Path

import numpy as np


def drop_from_cache(path: Path) -> bool:
    """Drop a file from the cache. False if that fails, for example with a file in memory, or on a system other than Linux."""
    if not hasattr(os, "posix_fadvise"):
        return False
    with path.open("rb") as file:
        os.fsync(file.fileno())  # pages that are not on the disk yet are not dropped
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as pages:
            return not any(in_memory(pages))


def in_memory(pages: mmap.mmap) -> bytes:
    """A byte for each page of a mapped file: 1 if the page cache holds it."""
    found = (ctypes.c_ubyte * math.ceil(len(pages) / mmap.PAGESIZE))()
    address = np.frombuffer(pages, np.uint8).ctypes.data
    if ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(pages)), found):
        raise OSError("mincore failed")
    return bytes(found)
