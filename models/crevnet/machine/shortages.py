"""What the machine lacks when a command fails: memory, shared memory, disk, open files, or a process that was killed."""

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
"""What an error's text holds: what the machine lacks, and the remedy. The first that fits counts."""


def lack_of(error: BaseException) -> str | None:
    """One line that names what the machine lacks and the remedy; None for an error of another kind."""
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
    """That memory has run out, of a GPU or of the machine, in the process itself or in one that reads data."""
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory ({first_sentence(error)})"
    found = _sentence(_MEMORY, error)
    if found is None and not isinstance(error, MemoryError):
        return None
    return f"out of memory ({found})" if found else "out of memory"


def first_sentence(error: BaseException | str) -> str:
    return " ".join(str(error).split()).partition(". ")[0].rstrip(".")


def _sentence(text: str, error: BaseException) -> str | None:
    """The sentence of an error that matches: a worker's error carries its traceback, an allocator's its place in PyTorch."""
    found = re.search(f"{_SENTENCE}(?:{text}){_SENTENCE}", str(error))
    return None if found is None else re.sub(r"^\w+Error: ", "", found[0].strip()).rstrip(".")
