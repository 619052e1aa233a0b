"""The C library's allocator, set to keep the memory that a training step frees."""

from __future__ import annotations

import ctypes

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3  # from malloc.h
LARGEST_MMAP_THRESHOLD = 32 * 2**20
KEPT = 2**30
"""Bytes."""


def keep_freed_memory() -> None:
    """Keep up to a gibibyte, so that no step waits for the system to return pages. CUDA's caching allocator does the same.

    By default, glibc gives free memory back and takes it again, at moments that depend on the sizes and the order of all
    allocations. That adds up to 0.1 to the ratio of two steps. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    for parameter, value in ((MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD), (TRIM_THRESHOLD, KEPT), (TOP_PAD, KEPT)):
        mallopt(parameter, value)
