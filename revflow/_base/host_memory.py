"""A mark on copies in the CPU's memory, so that measurements of a device's memory leave them out."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_thread = threading.local()


@contextmanager
def in_host_memory() -> Iterator[None]:
    """Mark the tensors that are created in this context as copies in the CPU's memory.

    If the network itself runs on the CPU, such a copy cannot be distinguished from a tensor of the device in any other way.
    """
    _thread.in_host_memory = True
    try:
        yield
    finally:
        _thread.in_host_memory = False


def is_in_host_memory() -> bool:
    """Whether the current code runs within `in_host_memory()`."""
    return getattr(_thread, "in_host_memory", False)
