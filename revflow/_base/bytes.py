"""Amounts of memory: as a user gives them, as a device has them, as a person reads them."""

from __future__ import annotations

import re
from numbers import Integral, Real
from pathlib import Path
from typing import Literal

import torch

MemoryBudget = int | float | str
"""Bytes, a share of the device's free memory, a size as "6GiB", "all" or "none"."""

_UNITS = {"B": 1, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
_UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def parse(given: MemoryBudget) -> int | float | Literal["all", "none"]:
    """Bytes as an int, a share as a float; ValueError or TypeError for what is neither."""
    if given == "all":
        return "all"
    if given == "none":
        return "none"
    if isinstance(given, str):
        return _bytes(given)
    if isinstance(given, bool) or not isinstance(given, Real):
        raise TypeError(f"memory_budget {_WANTED}; got {given!r}, a {type(given).__name__}")
    if isinstance(given, Integral):
        if given < 0:
            raise ValueError(f"memory_budget {_WANTED}; got {given}")
        return int(given)
    if not 0 < given <= 1:
        raise ValueError(f"memory_budget as a float is a share of the free memory, above 0 and at most 1; got {given}")
    return float(given)


_WANTED = 'has to be bytes (a whole number), a size as "6GiB", a share of the free memory as 0.8, "all" or "none"'


def _bytes(text: str) -> int:
    found = re.fullmatch(r"\s*(\d+\.?\d*)\s*([A-Za-z]+)\s*", text)
    if found is None or found[2] not in _UNITS:
        raise ValueError(f"memory_budget {_WANTED}; got {text!r} (units are {', '.join(_UNITS)})")
    return int(float(found[1]) * _UNITS[found[2]])


def free_memory(device: torch.device) -> int:
    """Bytes that a process could still take."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    if device.type == "cpu":
        try:
            return int(min(_available(), _left_in_container()))
        except OSError:
            pass
    raise RuntimeError(
        f"memory_budget as a share of the free memory is known for CUDA devices and on Linux, not for {device} here: give bytes"
    )


def _available() -> int:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def _left_in_container() -> float:
    """What a control group (version 2) leaves to its processes."""
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text(encoding="ascii") for name in ("max", "current"))
    except OSError:
        return float("inf")
    return float("inf") if limit.strip() == "max" else int(limit) - int(used)


def size(count: float) -> str:
    """Bytes, readable."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
