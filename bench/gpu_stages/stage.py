"""The stages of bench/gpu.py, the most valuable first."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
"""One result: names and values. Names end in `_bytes` if the value is in bytes."""
Rows = Iterator[Row]


class SkipError(Exception):
    """The reason why a stage does not apply here."""


@dataclass(frozen=True)
class Stage:
    name: str
    title: str
    limit: float
    """Seconds. The limits of all stages must sum to exactly 540, which are nine minutes.

    With other --minutes or fewer stages, the stage gets the same share.
    """
    function: str
    """module:name of a function of a `Setup` that yields rows. A string, so that only the stage's own process imports it."""


STAGES = (
    Stage("memory", "Memory of a training step, measured and predicted", 110, "gpu_stages.memory:rows"),
    Stage("capacity", "Largest batches under a memory cap", 80, "gpu_stages.capacity:rows"),
    Stage("correctness", "Correctness on the device", 95, "gpu_stages.correctness:rows"),
    Stage("tradeoff", "Memory against time of a training step", 60, "gpu_stages.tradeoff:rows"),
    Stage("speed", "Time of a training step", 60, "gpu_stages.speed:rows"),
    Stage("training", "A training run under a memory cap, stopped and resumed", 100, "gpu_stages.training:rows"),
    Stage("loading", "Loading against the pace of training", 35, "gpu_stages.loading:rows"),
)


@dataclass(frozen=True)
class Setup:
    """The arguments of a stage."""

    device: str
    """cuda or cpu."""
    toy: bool
    """Sizes that run on a CPU in seconds."""
    out: Path
    """Folder of results; of stages that have ended too."""
    work: Path
    """Folder for data and checkpoints, removed after the last stage."""
    end: float
    """The time at which the stage is stopped, by time.monotonic()."""

    @property
    def seconds_left(self) -> float:
        return self.end - time.monotonic()

    @property
    def frame(self) -> tuple[int, int]:
        """Height and width, pixels."""
        return (32, 32) if self.toy else (495, 436)

    @property
    def preset(self) -> str:
        """CrevNet's."""
        return "tiny" if self.toy else "paper"
