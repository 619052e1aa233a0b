"""Amounts of memory in text: a memory budget as the user gives it, and a number of bytes as a person reads it."""

from __future__ import annotations

import re
from numbers import Integral, Real
from typing import Literal

MemoryBudget = int | float | str
"""Bytes, a share of the device's free memory, a size such as "6GiB", "min" or "max"."""

_UNITS = {"B": 1, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
_UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def parse(given: MemoryBudget) -> int | float | Literal["min", "max"]:
    """Bytes as an int, a share as a float; ValueError or TypeError for anything else."""
    if given == "min":
        return "min"
    if given == "max":
        return "max"
    if given is None or given in ("none", "all"):
        raise ValueError(
            f'memory_budget={given!r} is invalid: use "min" (formerly "none") to recompute all activations, or "max" (formerly '
            f'"all") to store them'
        )
    if isinstance(given, str):
        return _parse_size(given)
    if isinstance(given, bool) or not isinstance(given, Real):
        raise TypeError(f"memory_budget {_EXPECTED}; got {given!r}, a {type(given).__name__}")
    if isinstance(given, Integral):
        if given < 0:
            raise ValueError(f"memory_budget {_EXPECTED}; got {given}, which is negative")
        return int(given)
    if not 0 < given <= 1:
        raise ValueError(
            f"memory_budget as a float must be a share of the free memory, above 0 and at most 1; got {given}. "
            f"Give bytes as a whole number"
        )
    return float(given)


_EXPECTED = (
    'must be a whole number of bytes, a size such as "6GiB", a share of the free memory such as 0.8, "min" or "max"'
)


def _parse_size(text: str) -> int:
    found = re.fullmatch(r"\s*(\d+\.?\d*)\s*([A-Za-z]+)\s*", text)
    if found is None or found[2] not in _UNITS:
        raise ValueError(f"memory_budget {_EXPECTED}; got {text!r}. The units are {', '.join(_UNITS)}")
    return int(float(found[1]) * _UNITS[found[2]])


def size(count: float) -> str:
    """A number of bytes in the largest unit, GiB at most, of which there is at least one."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
