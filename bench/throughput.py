"""A training step's useful operations, and the rate at which a device could do them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode


def operations(forward: Callable[[], object]) -> float:
    """Floating-point operations of a training step under standard autograd: three times those of its forward pass."""
    with FlopCounterMode(display=False) as counter:
        forward()
    return 3.0 * counter.get_total_flops()


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int = 8192) -> float:
    """Operations a second of products of square matrices, on CUDA."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(8):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        a @ a
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(seconds[3:])
