"""How large each model of an experiment is, how long it trains and how fast it learns, found once and kept in plan.yaml.

1. Memory: CrevNet's size is given. Each other model is as wide as its training step's predicted peak, parameters, gradients and
   Adam's state included, allows without being above CrevNet's; batches are the same.
2. Time: every model takes as many steps as fit into the same minutes, at the pace that its steps had in turns with the others',
   on one thread, in the process's own time. Reading data and validation, alike for all, are not counted.
3. Learning rates: each model tries the same ones for a tenth of its steps, and keeps the one with the best validation score.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

import revflow
from crevnet.data.city_data import CityData
from crevnet.networks.models import MODELS, make_network
from crevnet.traffic4cast.recipe.paper import Step
from crevnet.training.failures import DivergedError
from crevnet.training.scheduled_sampling import fed_frames
from crevnet.training.settings import RunSettings, save_yaml
from crevnet.training.trainer import FusedAdam

CREVNET = "crevnet"
WIDTHS = {"convlstm": "hidden", "predrnn": "hidden", "unet": "width"}
"""The models that CrevNet is compared with, and what their size is called."""
WIDEST = 512
RATES = (3e-4, 1e-3, 3e-3)
TRIAL = 10
"""A learning rate is tried for one in so many of a model's steps."""
TUNING = 16
"""An epoch of fine-tuning has one in so many of them."""
PACES = 7


@dataclass(frozen=True)
class Planned:
    """One model.

    Attributes:
        width: of a baseline's layers; CrevNet's is the recipe's.
        parameters: how many.
        peak: bytes of a training step, predicted.
        seconds: of a step, on one thread.
        batches: in each epoch.
        scores: validation scores of the learning rates that were tried.
        learning_rate: the best of them.
    """

    name: str
    width: int | None
    parameters: int
    peak: int
    seconds: float
    batches: int
    scores: dict[float, float]
    learning_rate: float

    def run(self, base: RunSettings, seed: int) -> RunSettings:
        """The settings of the model's run."""
        settings = settings_of(self.name, self.width, base)
        training = replace(settings.training, batches=self.batches, learning_rate=self.learning_rate, seed=seed)
        return replace(settings, training=training)


@dataclass(frozen=True)
class Plan:
    """Every model, CrevNet first; `minutes` of training for each, in `epochs`."""

    minutes: float
    epochs: int
    models: dict[str, Planned]

    @property
    def tuning_batches(self) -> int:
        """In an epoch of fine-tuning."""
        return max(1, self.epochs * self.models[CREVNET].batches // TUNING)


def load_plan(folder: Path, base: RunSettings, minutes: float) -> Plan:
    """The plan in a folder, made now where there is none. ValueError where it is for other minutes."""
    path = folder / "plan.yaml"
    if not path.is_file():
        save_yaml(path, asdict(_make_plan(folder / "rates", base, minutes)))
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    if found["minutes"] != minutes:
        raise ValueError(f"{path} was made for {found['minutes']} minutes a model, not {minutes}: choose another --out")
    return Plan(minutes, found["epochs"], {name: Planned(**values) for name, values in found["models"].items()})


def settings_of(name: str, width: int | None, base: RunSettings) -> RunSettings:
    """The base's settings, for the model of that name and width; for CrevNet as they are."""
    if name == CREVNET:
        return base
    frames = {field: getattr(base.model, field) for field in ("channels", "static", "past", "horizon")}
    model = MODELS[name].config(**frames, **{WIDTHS[name]: width})
    steps = base.training.sampling_steps if model.feeds_back else None
    return replace(base, model=model, training=replace(base.training, sampling_steps=steps))


def _make_plan(folder: Path, base: RunSettings, minutes: float) -> Plan:
    models = {}
    for name, size in _sizes(folder / "sizes.yaml", base).items():
        settings = settings_of(name, size["width"], base)
        batches = max(1, round(60 * minutes / size["seconds"] / base.training.epochs))
        scores = dict(_rate_scores(name, settings, folder, max(1, batches * base.training.epochs // TRIAL)))
        best = min(scores, key=scores.__getitem__)
        models[name] = Planned(name=name, **size, batches=batches, scores=scores, learning_rate=best)
    return Plan(minutes, base.training.epochs, models)


def _sizes(path: Path, base: RunSettings) -> dict[str, dict[str, Any]]:
    """Each model's width, parameters, peak and seconds, kept in a file: measured again they would come out otherwise."""
    if not path.is_file():
        height, width = CityData(base.data, base.model).training_days[0].shape[1:3]
        steps, widths = {CREVNET: TrainingStep(base, height, width)}, {CREVNET: None}
        for name in WIDTHS:
            print(f"{name}: how wide it may be", flush=True)
            widths[name] = _widest(name, steps[CREVNET].peak(), base, height, width)
            steps[name] = TrainingStep(settings_of(name, widths[name], base), height, width)
        paces = _paces(steps)
        sizes = {
            name: {"width": widths[name], "parameters": step.parameters(), "peak": step.peak(), "seconds": paces[name]}
            for name, step in steps.items()
        }
        save_yaml(path, sizes)
    found: dict[str, dict[str, Any]] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


def _widest(name: str, peak: int, base: RunSettings, height: int, width: int) -> int:
    """The largest whose step takes at most `peak` bytes; 1 where none does."""

    def fits(wide: int) -> bool:
        return TrainingStep(settings_of(name, wide, base), height, width).peak() <= peak

    low, high = 1, WIDEST
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _paces(steps: Mapping[str, TrainingStep]) -> dict[str, float]:
    """Seconds of each model's step: the median of several, in turns."""
    print("the pace of each", flush=True)
    running = {name: step.run() for name, step in steps.items()}
    for step in running.values():
        next(step)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(PACES):
        for name, step in running.items():
            began = time.process_time()
            next(step)
            times[name].append(time.process_time() - began)
    return {name: statistics.median(found) for name, found in times.items()}


def _rate_scores(name: str, settings: RunSettings, folder: Path, batches: int) -> Iterator[tuple[float, float]]:
    """Each learning rate that is tried, and its validation score."""
    for rate in RATES:
        training = replace(settings.training, epochs=1, batches=batches, learning_rate=rate)
        step = Step(f"{name}, learning rate {rate}", folder / name / str(rate), replace(settings, training=training))
        if step.score is None:
            print(step.name, flush=True)
        try:
            yield rate, step.run() if step.score is None else step.score
        except DivergedError:
            yield rate, math.inf


class TrainingStep:
    """A model's training step on random frames, to be measured."""

    def __init__(self, settings: RunSettings, height: int, width: int) -> None:
        self._settings, self._size = settings, (height, width)

    def parameters(self) -> int:
        return sum(p.numel() for p in make_network(self._settings.model).parameters())

    def peak(self) -> int:
        """Bytes that a step takes, parameters, gradients and Adam's state included, predicted."""

        def two() -> None:
            steps = self.run()
            next(steps)  # makes Adam's state
            next(steps)

        return revflow.measure_memory(two, predict=True).peak

    def run(self) -> Iterator[None]:
        """Steps without end."""
        model, training = self._settings.model, self._settings.training
        network = make_network(model)
        optimizer = FusedAdam(network.parameters(), training.learning_rate)
        batch = self._settings.data.batch_size
        frames = torch.rand(batch, model.window, model.channels, *self._size)
        static = torch.rand(batch, model.static_channels, *self._size)
        fed = None
        if training.sampling_steps is not None:
            fed = fed_frames(model.horizon - 1, training.sampling_steps, step=0, seed=0)
        while True:
            optimizer.zero_grad()
            network.loss(frames, static, training.loss, fed).backward()
            optimizer.step()
            yield
