"""Copies of a device's tensors in the CPU's memory, which are no part of what is measured."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_thread = threading.local()


@contextmanager
def in_host_memory() -> Iterator[None]:
    """Tensors made within are copies in the CPU's memory: where the CPU stands for a device, they do not count as its own."""
    _thread.in_host_memory = True
    try:
        yield
    finally:
        _thread.in_host_memory = False


def is_in_host_memory() -> bool:
    return getattr(_thread, "in_host_memory", False)
