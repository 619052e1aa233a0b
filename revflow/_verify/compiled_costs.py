"""Memory and time of a compiled training step, and of one under standard autograd that is not compiled."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from revflow._replay.mode import ordinary_autograd
from revflow._verify.costs import Measured, relative_times
from revflow._verify.step import Arguments, train, with_leaves
from revflow._verify.verification import Both
from revflow.memory import measure_memory

_Step = tuple[nn.Module, Callable[..., Any]]
"""A network, and the function that runs it."""


def measured(compiled: _Step, plain: nn.Module, arguments: Arguments, device: torch.device, memory: bool) -> Measured:
    """The measurements of a step that has been compiled, relative to standard autograd. `memory`: whether to measure that."""

    def standard(*inputs: Any, **context: Any) -> Any:
        with ordinary_autograd():
            return plain(*inputs, **context)

    steps: list[_Step] = [compiled, (plain, standard)]
    times = relative_times([partial(train, net, call, arguments) for net, call in steps], 1, device)
    if not memory or device.type not in ("cpu", "cuda"):
        return Measured(time=times[0])
    forward, step = [], []
    for net, call in steps:
        (inputs, context), _ = with_leaves(arguments)
        forward.append(_peak_and_kept(partial(call, *inputs, **context), device)[1])
        step.append(_peak_and_kept(partial(train, net, call, arguments), device)[0])
    return Measured(kept=Both(*forward), peak=Both(*step), time=times[0])


def _peak_and_kept(run: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """The peak of `run()` above the memory in use before, and the bytes in use after it, while its result exists.

    On the CPU, `measure_memory` sees operators, and not the buffers of compiled code. The profiler sees all allocations.
    """
    if device.type == "cuda":
        report = measure_memory(run, device=device)
        return report.peak, report.kept
    with _quiet_profiler(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = run()
    del result
    now = peak = 0
    events = profiled.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: int(event.start_ns())):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak, now


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """PyTorch 2.13's profiler prints a line whenever it starts or stops, unless this variable is set when it first starts."""
    name = "KINETO_LOG_LEVEL"
    before = os.environ.get(name)
    os.environ[name] = before or "99"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
