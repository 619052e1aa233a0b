"""The precision of a computation, and so the tolerance of its results."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from revflow._guard.tolerance import LOW_PRECISION, LOW_STREAMS, TOLERANCES, Tolerance
from revflow._replay.replay import Replay


def tolerance_of(results: Sequence[Tensor], replays: Sequence[Replay]) -> Tolerance:
    """The tolerance for the lowest precision among the `results`, and the parameters and autocast states of the `replays`."""
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
    """Whether products of float32 matrices, or convolutions, use TF32 on CUDA devices that have it."""
    try:
        return torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:  # PyTorch raises it if the precision is set for some operations and not for others
        return True
