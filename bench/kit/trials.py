"""A training step by several methods, each next to standard autograd: for bench/budget.py and bench/speed.py.

A method (bench/kit/methods.py) is first checked on a twin of the network in float64. Its loss, its gradients and the result of
its inverse are compared with standard autograd's, and evaluations of conditioners are counted. Then its memory and its time are
measured. If a library is missing, or does not apply to a network, the row has that remark.
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
from kit.methods import Method, Passes, UnfitError, plain
from kit.networks import Network, Streams
from kit.operations import Operations
from kit.time_row import Row

TOLERANCE = 1e-8
"""Of a gradient in float64: the L2 norm of its difference from standard autograd's, over the norm. (In float32 a recomputed value
near zero may fall on a ReLU's other side. That is not a fault, and changes the second digit of some small gradients.)"""

Step = Callable[[Callable[[], None]], object]
"""A function to time in two parts. It calls its argument between them."""


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
    """Copies an output, and inverts it."""
    memory: revflow.MemoryReport | None = None
    evaluations: float | None = None
    operations: Operations | None = None
    note: str = ""

    @property
    def label(self) -> str:
        return f"{self.method} {self.setting}".strip()

    def row(self, laps: Sequence[Lap]) -> Row:
        names = self.network, self.size, self.method, self.setting
        if self.memory is None:
            return Row(*names, note=self.note)
        ratios = [(lap.forward + lap.backward) / lap.plain for lap in laps]
        low, middle, high = statistics.quantiles(ratios, n=4)
        inverses = [lap.inverse / lap.plain for lap in laps if lap.inverse is not None]
        return Row(
            *names,
            time_ratio=middle,
            quartiles=(low, high),
            error=1.2533 * statistics.stdev(ratios) / len(ratios) ** 0.5,  # of a median of normally distributed values
            forward=statistics.median(lap.forward / lap.plain for lap in laps),
            backward=statistics.median(lap.backward / lap.plain for lap in laps),
            inverse=statistics.median(inverses) if inverses else None,
            seconds=statistics.median(lap.forward + lap.backward for lap in laps),
            evaluations=self.evaluations or None,  # compiled code calls no hooks
            peak=self.memory.peak,
            how=self.memory.how,
            **(self.operations._asdict() if self.operations else {}),
        )


def compare(trials: Sequence[Trial], rounds: int, device: torch.device) -> list[Row]:
    """A row for each trial; the first is standard autograd. Every step runs once per round, in random order."""
    steps = {i: trial.step for i, trial in enumerate(trials) if trial.step}
    laps: list[list[Lap]] = [[] for _ in trials]
    order = random.Random(0)
    for _ in range(rounds):
        for i in order.sample([*steps], len(steps)):
            # Next to standard autograd: a machine's speed changes from second to second.
            pair = order.sample([("plain", steps[0]), ("its", steps[i])], 2)
            times = {name: seconds(step, device) for name, step in pair}
            inverse = trials[i].inverse
            inverted = seconds(inverse, device)[1] if inverse else None
            laps[i].append(Lap(sum(times["plain"]), *times["its"], inverted))
    return [trial.row(its) for trial, its in zip(trials, laps, strict=True)]


def seconds(step: Step, device: torch.device) -> tuple[float, float]:
    """Times of its two parts: the process's own on the CPU, where other processes do not count; the device's on CUDA."""
    if device.type != "cuda":
        marks = [time.process_time()]
        step(lambda: marks.append(time.process_time()))
        marks.append(time.process_time())
        began, between, ended = marks
        return between - began, ended - between
    # Events need no wait for the device between the parts: the step is timed as it runs in training.
    first, second, third = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    torch.cuda.synchronize(device)
    first.record()
    step(second.record)
    third.record()
    torch.cuda.synchronize(device)
    return first.elapsed_time(second) / 1e3, second.elapsed_time(third) / 1e3


class Subject(NamedTuple):
    """A network to train by each method, and a twin in float64 to check the method on."""

    network: Network
    twin: Network
    expected: list[Tensor]
    """The twin's loss and gradients under standard autograd."""
    device: torch.device

    def attempt(self, method: Method) -> Trial:
        return attempt(method, *self)


def subject(
    make: Callable[[], Network], device: torch.device, prepare: Callable[[Network], None] = lambda network: None
) -> Subject:
    """`prepare` may change how the measured conditioners run, but not the twin's."""
    network, twin = make().to(torch.float32), make().to(torch.float64)
    prepare(network)
    return Subject(network, twin, proof(plain().of(twin), twin).results, device)


def attempt_all(
    methods: Iterable[Method],
    make: Callable[[], Network],
    device: torch.device,
    prepare: Callable[[Network], None] = lambda network: None,
) -> Iterator[Trial]:
    """Standard autograd, and the methods; `prepare` as in `subject`."""
    trained = subject(make, device, prepare)
    for method in [plain(), *methods]:
        yield trained.attempt(method)


def attempt(method: Method, network: Network, twin: Network, expected: list[Tensor], device: torch.device) -> Trial:
    """Check it on the twin, and measure its memory."""
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
        step(nothing)  # revflow plans by its first step, and torch.compile compiles
        inverse = inverting(passes, network)
        memory = revflow.measure_memory(lambda: step(nothing), device=device)
        return Trial(*names, step, inverse, memory, proven.evaluations)
    except UnfitError as reason:
        return Trial(*names, note=str(reason))
    except Exception as fault:
        if not method.may_fail:
            raise
        return Trial(*names, note=first_line(fault))


def nothing() -> None:
    """Between the parts of a step that is not timed."""


def first_line(fault: Exception) -> str:
    if isinstance(fault, ImportError):
        return f"not installed: {fault}"
    return f"{type(fault).__name__}: {fault}".splitlines()[0]


class Proof(NamedTuple):
    """Results of the second step, which revflow has planned."""

    results: list[Tensor]
    """The loss, and the gradients of input and parameters."""
    evaluations: float
    """Of a conditioner."""
    unrestored: float
    """Relative difference of the inverse's result from the input."""


def proof(passes: Passes, twin: Network) -> Proof:
    twin.step(passes.forward)
    twin.to(torch.float64)  # without gradients
    with counted(twin.conditioners) as samples:
        loss = twin.step(passes.forward)
    gradients = [grad.clone() for p in twin.parameters if (grad := p.grad) is not None]
    unrestored = 0.0
    if passes.inverse:
        with torch.no_grad():
            x = passes.inverse(passes.forward(twin.leaf.clone()))
        unrestored = difference([twin.joined(x)], [twin.leaf.detach()])
    return Proof([loss, *gradients], sum(samples) / (len(twin.conditioners) * len(twin.leaf)), unrestored)


@contextmanager
def counted(modules: Sequence[nn.Module]) -> Iterator[list[int]]:
    """The number of samples that the modules get: a list with an entry for each call."""
    samples: list[int] = []
    hooks = [module.register_forward_pre_hook(lambda _, inputs: samples.append(len(inputs[0]))) for module in modules]
    try:
        yield samples
    finally:
        for hook in hooks:
            hook.remove()


def inverting(passes: Passes, network: Network) -> Step | None:
    inverse = passes.inverse
    if inverse is None:
        return None
    with torch.no_grad():
        y = passes.forward(network.leaf.clone())

    @torch.no_grad()
    def invert(between: Callable[[], None]) -> Tensor | Streams:
        copy = y.clone() if isinstance(y, Tensor) else tuple(stream.clone() for stream in y)  # memcnn empties its input
        between()
        return inverse(copy)

    return invert


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative difference, by L2 norms."""
    return max(float((f - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True))
