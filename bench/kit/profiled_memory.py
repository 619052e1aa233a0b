"""Memory of code that runs in compiled graphs: of allocations as PyTorch's profiler sees them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

import revflow


def peak_and_kept(run: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """The peak of `run()` above the memory in use before, and the bytes in use after it, while its result exists.

    On the CPU, `revflow.measure_memory` sees only operators, and not the buffers of compiled code.
    """
    if device.type == "cuda":
        report = revflow.measure_memory(run, device=device)
        return report.peak, report.kept
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = run()
    del result
    now = peak = 0
    events = profiled.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: int(event.start_ns())):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak, now
