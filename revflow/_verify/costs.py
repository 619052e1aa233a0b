"""Memory and time of a training step: with the engine, under standard autograd, and with checkpointing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from revflow._replay.mode import ordinary_autograd
from revflow._verify.checkpointing import Checkpointing
from revflow._verify.inspection import seeded
from revflow._verify.step import Arguments, train, with_leaves
from revflow._verify.verification import Both, Checkpoint
from revflow.memory import measure_memory

_Way = Callable[[nn.Module], AbstractContextManager[None]]
"""Within the context that it returns for a network, a step of that network runs in this way."""


class Measured(NamedTuple):
    """The fields of `Verification` that are measured; None if they are not."""

    kept: Both | None = None
    peak: Both | None = None
    time: float | None = None
    checkpoint: Checkpoint | None = None


class Costs:
    """Measures training steps on copies of a network, which `copy` makes."""

    def __init__(self, copy: Callable[[], nn.Module], arguments: Arguments, device: torch.device) -> None:
        self._copy, self._arguments, self._device = copy, arguments, device

    def measured(self, checkpointing: Checkpointing | None) -> Measured:
        """All measurements; without those of checkpointing if it is None."""
        ways: list[_Way] = [_engine, _standard]
        if checkpointing is not None:
            ways.append(checkpointing.of)
        kept, peak = [], []
        for way in ways if self._device.type in ("cpu", "cuda") else []:
            its_kept, its_peak = self._memory(way)
            kept.append(its_kept)
            peak.append(its_peak)
        times = self._times(ways)
        return Measured(
            kept=Both(*kept[:2]) if kept else None,
            peak=Both(*peak[:2]) if peak else None,
            time=times[0],
            checkpoint=None if checkpointing is None else Checkpoint(peak[2] if peak else None, times[2]),
        )

    def _memory(self, way: _Way) -> tuple[int, int]:
        """Bytes alive after a forward pass, and the peak of a forward and a backward pass."""
        net = self._copy()
        (inputs, context), _ = with_leaves(self._arguments)
        with seeded(self._device):
            with way(net):
                forward = measure_memory(partial(net, *inputs, **context), device=self._device)
            with way(net):
                step = measure_memory(partial(train, net, net, self._arguments), device=self._device)
        return forward.kept, step.peak

    def _times(self, ways: list[_Way]) -> list[float]:
        """Times of a step relative to standard autograd."""
        net = self._copy()
        steps = [partial(self._train, net, way) for way in ways]
        return relative_times(steps, ways.index(_standard), self._device)

    def _train(self, net: nn.Module, way: _Way) -> None:
        with way(net):
            train(net, net, self._arguments)


def relative_times(steps: Sequence[Callable[[], None]], standard: int, device: torch.device) -> list[float]:
    """Times of steps relative to the one with the index `standard`: medians of three rounds, after a round that warms up."""
    with seeded(device):
        rounds = [[_seconds(step, device) for step in steps] for _ in range(4)]
    return [statistics.median(times[k] / times[standard] for times in rounds[1:]) for k in range(len(steps))]


def _seconds(step: Callable[[], None], device: torch.device) -> float:
    begin = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def _engine(net: nn.Module) -> AbstractContextManager[None]:
    return nullcontext()


def _standard(net: nn.Module) -> AbstractContextManager[None]:
    return ordinary_autograd()
