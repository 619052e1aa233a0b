"""The time of a training step of CrevNet under each schedule, as a ratio to ordinary autograd's: see bench/schedules.py.

    python bench/speed.py --preset tiny --height 128 --width 112 --json speed.json

Every schedule runs once a round, in random order; a ratio is the median of the rounds' own. On the CPU times are the
process's own, so that other processes do not count. Beside it stand the peak of live tensors of one step, Adam and the
parameters included, and how often a recurrent cell is evaluated for a time step.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import revflow
from crevnet import PRESETS, CrevNet
from schedules import SCHEDULES, Precision, Training


@dataclass(frozen=True)
class Row:
    """A schedule against ordinary autograd in the same run."""

    network: str
    method: str
    setting: str
    time_ratio: float
    quartiles: tuple[float, float]
    peak: int
    """Bytes."""
    evaluations: float
    """Of a recurrent cell, for a time step of a training step."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--schedule", nargs="+", choices=SCHEDULES, default=list(SCHEDULES), help="beside plain")
    parser.add_argument("--precision", choices=get_args(Precision), default="32-true")
    parser.add_argument("--steps", type=int, default=11, help="time steps")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--height", type=int, default=495)
    parser.add_argument("--width", type=int, default=436)
    parser.add_argument("--rounds", type=int, default=7, help="2 at least")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    a = parser.parse_args()
    if min(a.steps, a.batch, a.height, a.width) < 1 or a.rounds < 2:
        parser.error("--steps, --batch, --height and --width have to be 1 at least, --rounds 2")
    if a.json and not a.json.parent.is_dir():
        parser.error(f"--json {a.json}: there is no folder {a.json.parent}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, 1 thread"
    torch.set_num_threads(1)
    trainings = {
        schedule: Training(a.preset, schedule, a.precision, a.batch, a.steps, a.height, a.width, device)
        for schedule in dict.fromkeys(["plain", *a.schedule])
    }
    rows = compare(trainings, a.rounds)
    print(f"{hardware}, Python {platform.python_version()}, torch {torch.__version__}, {a.rounds} rounds")
    Console(width=max(Console().width, 110)).print(table(rows))
    if a.json:
        a.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


def compare(trainings: dict[str, Training], rounds: int) -> list[Row]:
    """A row for each training; "plain" has to be among them."""
    steps = {name: training.train() for name, training in trainings.items()}
    for its in steps.values():
        next(its)
    ratios: dict[str, list[float]] = {name: [] for name in trainings}
    order = random.Random(0)
    for _ in range(rounds):
        times = {n: seconds(partial(next, steps[n]), trainings[n].device) for n in order.sample([*steps], len(steps))}
        for name, taken in times.items():
            ratios[name].append(taken / times["plain"])
    del steps
    rows = []
    for name, t in trainings.items():
        low, middle, high = statistics.quantiles(ratios[name], n=4)
        peak = revflow.measure_memory(partial(_first_step, t), device=t.device).peak
        setting = f"{t.precision}, batch {t.batch}, {t.steps} steps of {t.height} x {t.width}"
        rows.append(Row(f"crevnet-{t.preset}", name, setting, middle, (low, high), peak, evaluations(t)))
    return rows


def _first_step(training: Training) -> None:
    next(training.train())


def seconds(step: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        began = time.process_time()
        step()
        return time.process_time() - began
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    step()
    torch.cuda.synchronize(device)
    return time.perf_counter() - began


def evaluations(training: Training) -> float:
    """How often a recurrent cell runs for a time step of a training step."""
    network, inputs = training.trainee()
    calls = 0

    def count(module: nn.Module, given: object) -> None:
        nonlocal calls
        calls += 1

    cells = cells_of(network)
    for cell in cells:
        cell.register_forward_pre_hook(count)
    training.loss(network, inputs).backward()
    return calls / (len(cells) * training.steps)


def cells_of(network: CrevNet) -> list[nn.Module]:
    return [module.cell for module in network.predictor.stack]  # type: ignore[misc]


def table(rows: list[Row]) -> Table:
    found = Table(title=f"A training step: {rows[0].network}, {rows[0].setting}")
    for name in ("method", "time, plain = 1", "quartiles", "peak, MiB", "evaluations"):
        found.add_column(name, justify="left" if name == "method" else "right")
    for r in rows:
        quartiles = f"{r.quartiles[0]:.2f} to {r.quartiles[1]:.2f}"
        found.add_row(r.method, f"{r.time_ratio:.2f}", quartiles, f"{r.peak / 2**20:,.1f}", f"{r.evaluations:.2f}")
    return found


if __name__ == "__main__":
    main()
