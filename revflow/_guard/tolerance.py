"""Tolerances of recomputed values, by the precision of streams and of the computation."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tolerance(NamedTuple):
    """Relative errors from which on the guard warns, and from which on it raises an error."""

    warn: float
    error: float


TOLERANCES = {torch.float64: Tolerance(1e-8, 1e-4), torch.float32: Tolerance(1e-4, 1e-2)}
LOW_PRECISION = Tolerance(2e-2, 1e-1)
"""The tolerance if parameters, autocast or TF32 products have 8 to 11 bits."""

LOW_STREAMS = Tolerance(1e-2, 1e-1)
"""The tolerance if the streams have 8 to 11 bits. Recomputed values and their gradients then lose digits in every block."""
