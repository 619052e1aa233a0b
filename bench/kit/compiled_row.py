"""A row of bench/compiled.py."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A training step by one method. Times are in units of an eager step of standard autograd."""

    network: str
    size: str
    method: str
    setting: str
    """Empty for an eager step."""
    time_ratio: float
    quartiles: tuple[float, float]
    saved_streams: float
    peak: int
    """Bytes."""
    compile_seconds: float | None
