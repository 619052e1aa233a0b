"""Recognizes errors from a lack of memory, shared memory, disk space or open files, and from killed processes."""

from __future__ import annotations

import re

import torch

from crevnet.machine.files import NoRoomError

_SENTENCE = r"(?:[^.\n]|\.(?! ))*"  # "1.00 PiB" is within one
_MEMORY = "can't allocate memory|Unable to allocate|Cannot allocate memory|MemoryError"
_REMEDIES = {
    "Too many open files|items of ancdata": (
        "too many open files",
        "raise the limit (ulimit -n), or lower --data.workers",
    ),
    r"killed by signal: Bus error|shared memory\(shm\)|</torch_|no shared memory": (
        "shared memory is too small",
        "give the container more (docker run --shm-size=8g), or load data without workers (--data.workers=0)",
    ),
    "^DataLoader worker": (
        "a process that reads data has died",
        "load data without workers (--data.workers=0), or increase the available memory and, in a container, the shared memory "
        "(docker run --shm-size=8g)",
    ),
}
"""Pattern in an error's text -> the shortage and the remedy. The first match counts."""


def lack_of(error: BaseException) -> str | None:
    """The shortage behind an error and its remedy, in one line; None for other errors."""
    if isinstance(error, NoRoomError):
        return str(error)
    memory = out_of_memory(error)
    if memory is not None:
        return f"{memory}: lower --data.batch_size or --data.workers, or increase the available memory"
    for text, (lack, remedy) in _REMEDIES.items():
        found = _sentence(text, error)
        if found is not None:
            return f"{lack} ({found}): {remedy}"
    return None


def out_of_memory(error: BaseException) -> str | None:
    """A description if GPU or CPU memory has run out, in this process or in a worker that reads data; else None."""
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory ({first_sentence(error)})"
    found = _sentence(_MEMORY, error)
    if found is None and not isinstance(error, MemoryError):
        return None
    return f"out of memory ({found})" if found else "out of memory"


def first_sentence(error: BaseException | str) -> str:
    return " ".join(str(error).split()).partition(". ")[0].rstrip(".")


def _sentence(text: str, error: BaseException) -> str | None:
    """The sentence of an error that matches. A worker's error also contains its traceback, an allocator's PyTorch's source."""
    found = re.search(f"{_SENTENCE}(?:{text}){_SENTENCE}", str(error))
    return None if found is None else re.sub(r"^\w+Error: ", "", found[0].strip()).rstrip(".")
