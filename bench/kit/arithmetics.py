"""The arithmetics of bench/drift.py, and its rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Arithmetic(NamedTuple):
    """How a module stack computes."""

    name: str
    exact: bool
    autocast: bool


ARITHMETICS = (
    Arithmetic("float32", False, False),
    Arithmetic("float32 streams, bf16 autocast", False, True),
    Arithmetic("exact", True, False),
    Arithmetic("exact, bf16 autocast", True, True),
)


@dataclass(frozen=True)
class Row:
    """Relative errors of a stack of that many blocks."""

    arithmetic: str
    blocks: int
    rebuilt: float
    """Of the recomputed input."""
    gradients: float
