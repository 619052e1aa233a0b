"""A training step by several methods, each next to standard autograd: for bench/budget.py and bench/speed.py.

A method (bench/methods.py) is first put to the proof on a twin of the network in float64: its loss, its gradients and what its
inverse makes are compared with standard autograd's, and evaluations of conditioners are counted. Then its memory is measured,
and its time. Where a library is missing, or not for a network, the row says so.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

import revflow
from methods import Method, Passes, UnfitError, plain
from networks import Network, Streams

TOLERANCE = 1e-8
"""Of a gradient in float64: the L2 norm of its difference from standard autograd's, over the norm. (In float32 a rebuilt value
next to zero may fall on a ReLU's other side, which is no fault and shows in the second digit of some small gradient.)"""

Step = Callable[[Callable[[], None]], object]
"""Something to be timed in two parts: it calls what it is given between them."""


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
    """With what it runs again."""
    inverse: float | None = None
    """The input from the output, without a graph; where the method has that."""
    seconds: float | None = None
    """A step."""
    evaluations: float | None = None
    """Of a conditioner in a step; of CrevNet's recurrent cells, for a time step."""
    peak: int | None = None
    """Bytes."""
    how: str | None = None
    """The peak was measured."""
    throughput: float | None = None
    """Standard autograd's operations in the step's time, as a share of the rate of matrix products; on CUDA alone."""
    note: str = ""

    @property
    def label(self) -> str:
        return f"{self.method} {self.setting}".strip()


class Lap(NamedTuple):
    """Seconds of a step's parts, and of a step of standard autograd next to it."""

    plain: float
    forward: float
    backward: float
    inverse: float | None


@dataclass
class Trial:
    """A method on a network, before it is timed: its step, or a note."""

    network: str
    size: str
    method: str
    setting: str = ""
    step: Step | None = None
    inverse: Step | None = None
    """Copies an output, and undoes it."""
    memory: revflow.MemoryReport | None = None
    evaluations: float | None = None
    note: str = ""

    def row(self, laps: Sequence[Lap]) -> Row:
        names = self.network, self.size, self.method, self.setting
        if self.memory is None:
            return Row(*names, note=self.note)
        ratios = [(lap.forward + lap.backward) / lap.plain for lap in laps]
        low, middle, high = statistics.quantiles(ratios, n=4)
        return Row(
            *names,
            time_ratio=middle,
            quartiles=(low, high),
            error=1.2533 * statistics.stdev(ratios) / len(ratios) ** 0.5,  # of a median of values that scatter normally
            forward=statistics.median(lap.forward / lap.plain for lap in laps),
            backward=statistics.median(lap.backward / lap.plain for lap in laps),
            inverse=statistics.median(lap.inverse / lap.plain for lap in laps) if self.inverse else None,
            seconds=statistics.median(lap.forward + lap.backward for lap in laps),
            evaluations=self.evaluations or None,  # compiled code calls no hooks
            peak=self.memory.peak,
            how=self.memory.how,
        )


def compare(trials: Sequence[Trial], rounds: int, device: torch.device) -> list[Row]:
    """A row for each trial; the first is standard autograd. Every step runs once a round, in random order."""
    able = [i for i, trial in enumerate(trials) if trial.step]
    laps: list[list[Lap]] = [[] for _ in trials]
    order = random.Random(0)
    for _ in range(rounds):
        for i in order.sample(able, len(able)):
            # Next to standard autograd: a machine's speed changes from second to second.
            pair = order.sample([("plain", trials[0].step), ("its", trials[i].step)], 2)
            times = {name: seconds(step, device) for name, step in pair}
            undone = trials[i].inverse and seconds(trials[i].inverse, device)[1]
            laps[i].append(Lap(sum(times["plain"]), *times["its"], undone))
    return [trial.row(its) for trial, its in zip(trials, laps, strict=True)]


def seconds(step: Step, device: torch.device) -> tuple[float, float]:
    """Its two parts: the process's own time on the CPU, where other processes do not count; the device's on CUDA."""
    if device.type != "cuda":
        marks = [time.process_time()]
        step(lambda: marks.append(time.process_time()))
        marks.append(time.process_time())
        began, between, ended = marks
        return between - began, ended - between
    # Events, so that nobody waits for the device between the parts: the step is timed as it runs in training.
    first, second, third = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    torch.cuda.synchronize(device)
    first.record()
    step(second.record)
    third.record()
    torch.cuda.synchronize(device)
    return first.elapsed_time(second) / 1e3, second.elapsed_time(third) / 1e3


def attempt_all(
    methods: Iterable[Method],
    make: Callable[[], Network],
    device: torch.device,
    prepare: Callable[[Network], None] = lambda network: None,
) -> Iterator[Trial]:
    """Standard autograd, and the methods. `prepare` may change how the conditioners run that are measured, not the twin's."""
    network, twin = make().to(torch.float32), make().to(torch.float64)
    prepare(network)
    expected = proof(plain().of(twin), twin).results
    for method in [plain(), *methods]:
        yield attempt(method, network, twin, expected, device)


def attempt(method: Method, network: Network, twin: Network, expected: list[Tensor], device: torch.device) -> Trial:
    """Put it to the proof on the twin, and measure its memory."""
    names = network.name, network.size, method.name, method.setting
    try:
        proven = proof(method.of(twin), twin)
        error = difference(proven.results, expected)
        if not error < TOLERANCE:
            raise AssertionError(f"gradients differ from standard autograd's by {error:.0e}")
        if not proven.unrestored < TOLERANCE:
            raise AssertionError(f"its inverse misses the input by {proven.unrestored:.0e}")
        passes = method.of(network)
        step = partial(network.step, passes.forward)
        step()  # revflow plans by its first step, torch.compile compiles
        inverse = undoing(passes, network) if passes.inverse else None
        return Trial(*names, step, inverse, revflow.measure_memory(step, device=device), proven.evaluations)
    except UnfitError as reason:
        return Trial(*names, note=str(reason))
    except Exception as fault:
        if not method.may_fail:
            raise
        return Trial(*names, note=first_line(fault))


def first_line(fault: Exception) -> str:
    if isinstance(fault, ImportError):
        return f"not installed: {fault}"
    return f"{type(fault).__name__}: {fault}".splitlines()[0]


class Proof(NamedTuple):
    """What a step computes, the second one, which revflow has planned."""

    results: list[Tensor]
    """The loss, and the gradients of input and parameters."""
    evaluations: float
    """Of a conditioner."""
    unrestored: float
    """By how much what the inverse makes differs from the input."""


def proof(passes: Passes, twin: Network) -> Proof:
    twin.step(passes.forward)
    twin.to(torch.float64)  # without gradients
    with counted(twin.conditioners) as samples:
        loss = twin.step(passes.forward)
    gradients = [parameter.grad.clone() for parameter in twin.parameters]
    unrestored = 0.0
    if passes.inverse:
        with torch.no_grad():
            x = passes.inverse(passes.forward(twin.leaf.clone()))
        unrestored = difference([twin.joined(x)], [twin.leaf.detach()])
    return Proof([loss, *gradients], sum(samples) / (len(twin.conditioners) * len(twin.leaf)), unrestored)


@contextmanager
def counted(modules: Sequence[nn.Module]) -> Iterator[list[int]]:
    """How many samples the modules are given: a list with an entry for each call."""
    samples: list[int] = []
    hooks = [module.register_forward_pre_hook(lambda _, inputs: samples.append(len(inputs[0]))) for module in modules]
    try:
        yield samples
    finally:
        for hook in hooks:
            hook.remove()


def undoing(passes: Passes, network: Network) -> Step:
    with torch.no_grad():
        y = passes.forward(network.leaf.clone())

    @torch.no_grad()
    def undo(between: Callable[[], None]) -> Tensor | Streams:
        copy = y.clone() if isinstance(y, Tensor) else tuple(stream.clone() for stream in y)  # memcnn empties its input
        between()
        return passes.inverse(copy)

    return undo


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest, relative, by L2 norms."""
    return max(((f - e).norm() / e.norm()).item() for f, e in zip(found, expected, strict=True))
