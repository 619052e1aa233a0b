"""The pace of a training step: sequences per second, useful operations, and the device's rate of matrix products."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from kit.schedules import Training
from kit.trials import seconds


def sequences_per_second(training: Training, rounds: int = 5) -> float:
    """In training: the median of that many steps, after a first step that also does the one-time work."""
    steps = training.train()

    def step(between: Callable[[], None]) -> None:
        next(steps)
        between()

    _, *times = (sum(seconds(step, training.device)) for _ in range(rounds + 1))
    return training.batch / statistics.median(times)


def share_of_matrix_rate(training: Training, rate: float) -> float | None:
    """Useful operations at `rate` sequences per second, as a share of the device's matrix products; on CUDA."""
    if training.device.type != "cuda":
        return None
    dtype = torch.float16 if training.precision == "16-mixed" else torch.float32
    return operations_per_sequence(training) * rate / matrix_rate(training.device, dtype)


def operations_per_sequence(training: Training) -> float:
    """Floating-point operations of a training step on one sequence."""
    return _operations(replace(training, schedule="plain", batch=1, device=torch.device("meta"), precision="32-true"))


@cache
def _operations(one: Training) -> float:
    with torch.device("meta"):
        network, inputs = one.trainee()
        return operations(partial(one.loss, network, inputs))


def operations(forward: Callable[[], object]) -> float:
    """Floating-point operations of a training step under standard autograd: three times those of its forward pass."""
    with FlopCounterMode(display=False) as counter:
        forward()
    return 3.0 * float(counter.get_total_flops())


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int = 8192) -> float:
    """Operations per second of products of square matrices, on CUDA."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    times = []
    for _ in range(8):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        a @ a
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return 2.0 * size**3 / statistics.median(times[3:])
