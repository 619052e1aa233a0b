"""Trials of all of CrevNet under the schedules of bench/kit/schedules.py, for bench/speed.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, nn

import revflow
from crevnet import CrevNet
from kit import rates, trials
from kit.libraries import PEERS
from kit.precisions import autocast
from kit.schedules import SCHEDULES, Training
from kit.trials import Step, Trial, nothing


@dataclass(frozen=True)
class Prepared(Training):
    """Of a network that is compiled, or whose convolutions are in the layout of tensor cores."""

    compiled: bool = False
    channels_last: bool = False

    def trainee(self) -> tuple[CrevNet, list[Tensor]]:
        network, inputs = super().trainee()
        assert isinstance(network, CrevNet)
        if self.channels_last:
            network.to(memory_format=network.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
        if self.compiled:
            network.compile_parts()
        return network, inputs


def of_crevnet(base: Prepared, schedules: Sequence[str], precision: str) -> Iterator[Trial]:
    """Standard autograd, and the schedules."""
    names = f"crevnet-{base.preset}", f"batch {base.batch}, {base.steps} steps of {base.height} x {base.width}"
    for schedule in dict.fromkeys(["plain", *schedules]):
        training = replace(base, schedule=schedule)
        if base.compiled and SCHEDULES[schedule].checkpoints:
            yield Trial(*names, schedule, note="compiling its parts would disable their checkpoints")
            continue
        start = partial(training_step, training, precision)
        memory = revflow.measure_memory(lambda: start()(nothing), device=base.device)  # noqa: B023
        step = start()
        step(nothing)
        yield Trial(
            *names, schedule, step=step, memory=memory, evaluations=evaluations(replace(training, compiled=False))
        )
    for peer in PEERS:
        yield Trial(*names, peer, note="only for module stacks: CrevNet's predictor is recurrent")


def training_step(training: Training, precision: str) -> Step:
    """A network's forward pass; then the backward pass and Adam."""
    between = nothing

    def watch(forward: Callable[[], Tensor]) -> Tensor:
        with autocast(precision, training.device):
            loss = forward()
        between()
        return loss

    steps = training.train(watch)

    def step(given: Callable[[], None]) -> None:
        nonlocal between
        between = given
        next(steps)

    return step


def evaluations(training: Training) -> float:
    """Evaluations of a recurrent cell per time step of a training step."""
    network, inputs = training.trainee()
    assert isinstance(network, CrevNet)
    cells = cells_of(network)
    with trials.counted(cells) as samples:
        training.loss(network, inputs).backward()
    return sum(samples) / (len(cells) * training.steps * training.batch)


def cells_of(network: CrevNet) -> list[nn.Module]:
    return [module.cell for module in network.predictor.stack]  # type: ignore[misc]


def operations_of_crevnet(training: Prepared) -> float:
    return training.batch * rates.operations_per_sequence(replace(training, compiled=False))
