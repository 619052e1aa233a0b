"""A row of bench/budget.py and bench/speed.py: a training step by one method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Row:
    """A method's training step, or the reason why it has none. Times are in units of a step of standard autograd."""

    network: str
    size: str
    method: str
    setting: str = ""
    precision: str = "32-true"
    compiled: bool = False
    """By torch.compile: the conditioners."""
    channels_last: bool = False
    """The layout of CrevNet's convolutions."""
    time_ratio: float | None = None
    quartiles: tuple[float, float] | None = None
    error: float | None = None
    """Of the ratio: its standard error."""
    forward: float | None = None
    backward: float | None = None
    """With its recomputation."""
    inverse: float | None = None
    """The input from the output, without a graph, if the method has that."""
    seconds: float | None = None
    """Per step."""
    evaluations: float | None = None
    """Of a conditioner per step; of CrevNet's recurrent cells, per time step."""
    peak: int | None = None
    """Bytes."""
    how: str | None = None
    """The peak was measured."""
    throughput: float | None = None
    """Standard autograd's operations in the step's time, as a share of the rate of matrix products; only on CUDA."""
    convolutions: int | None = None
    """Evaluations per step, as are the other counts; without those of backward passes."""
    products: int | None = None
    """Matrix products."""
    flops: int | None = None
    """Floating-point operations of both and of attention, with those of backward passes."""
    calls: int | None = None
    """Operators, views and copies included."""
    note: str = ""

    @property
    def label(self) -> str:
        return f"{self.method} {self.setting}".strip()

    @property
    def figures(self) -> Figures | None:
        """The row's measurements, or None if it has a note instead."""
        found = self.time_ratio, self.quartiles, self.error, self.forward, self.backward, self.seconds, self.peak
        time_ratio, quartiles, error, forward, backward, seconds, peak = found
        if (
            time_ratio is None
            or quartiles is None
            or error is None
            or forward is None
            or backward is None
            or seconds is None
            or peak is None
        ):
            return None
        return Figures(time_ratio, quartiles, error, forward, backward, seconds, peak)


class Figures(NamedTuple):
    """A row's measurements, which it has all or none."""

    time_ratio: float
    quartiles: tuple[float, float]
    error: float
    forward: float
    backward: float
    seconds: float
    peak: int
