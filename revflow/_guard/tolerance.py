"""Which relative errors of what is recomputed are noticeable, and which are faults, by the precision of the computation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from revflow._replay.replay import Replay


class Tolerance(NamedTuple):
    """Relative errors: from the first on the guard warns, from the second on it raises."""

    warn: float
    error: float


TOLERANCES = {torch.float64: Tolerance(1e-8, 1e-4), torch.float32: Tolerance(1e-4, 1e-2)}
LOW_PRECISION = Tolerance(2e-2, 1e-1)
"""If parameters, autocast or TF32 products have 8 to 11 bits."""

LOW_STREAMS = Tolerance(1e-2, 1e-1)
"""If the streams themselves have so few: then what is recomputed loses digits in every block, and gradients with it."""


def tolerance_of(results: Sequence[Tensor], replays: Sequence[Replay]) -> Tolerance:
    """By the least precise of what the `replays` compute their `results` with."""
    if any(s.dtype.to_real() not in TOLERANCES for s in results):
        return LOW_STREAMS
    if any(enabled for replay in replays for _, enabled, _ in replay.autocast) or (
        any(s.is_cuda and s.dtype == torch.float32 for s in results) and tf32()
    ):
        return LOW_PRECISION
    tensors = [*results, *(p for replay in replays for p in replay.parameters)]
    floats = [t.dtype.to_real() for t in tensors if t.is_floating_point() or t.is_complex()]
    return max([TOLERANCES.get(dtype, LOW_PRECISION) for dtype in floats], default=LOW_PRECISION)


def tf32() -> bool:
    try:
        return torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:  # set for some operations, not for all
        return True
