"""The largest batch that trains within a device's memory, and the time of a sequence then: see bench/schedules.py.

    python bench/capacity.py --preset paper --capacity 16 32 --json capacity.json

On a CUDA device ("cuda") the process is capped to each capacity and batches are tried; out of memory is a result. At the
largest batch training steps are timed, and their useful operations (those of ordinary autograd, nothing twice) are held
against the device's measured rate of matrix products. Without one ("predicted") the batch is the largest whose peak, counted
under fake tensors, is within the capacity: convolutions' workspaces, the allocator's gaps and CUDA's own memory (half a GiB)
come on top, so ask for a lower capacity than the device has.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import get_args

import torch
from rich.console import Console
from rich.table import Table

import revflow
import throughput
from crevnet import PRESETS
from schedules import SCHEDULES, Precision, Training

GIB = 2**30


@dataclass(frozen=True)
class Row:
    """A schedule within a capacity."""

    model: str
    preset: str
    schedule: str
    precision: str
    steps: int
    height: int
    width: int
    capacity: float
    """GiB."""
    how: str
    batch: int
    """The largest that trains; 0 if none does."""
    peak: int | None
    """Bytes at that batch."""
    milliseconds: float | None
    """A sequence, at that batch; measured on CUDA alone."""
    throughput: float | None
    """Useful operations a second, as a share of the rate of matrix products in the same precision."""


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="paper")
    parser.add_argument("--schedule", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    parser.add_argument("--precision", nargs="+", choices=get_args(Precision), default=["32-true"])
    parser.add_argument("--capacity", nargs="+", type=gibibytes, default=[16.0, 32.0], help="GiB")
    parser.add_argument("--steps", type=int, default=11, help="time steps")
    parser.add_argument("--height", type=int, default=495)
    parser.add_argument("--width", type=int, default=436)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    a = parser.parse_args()
    if min(a.steps, a.height, a.width) < 1:
        parser.error("--steps, --height and --width have to be 1 at least")
    if a.json and not a.json.parent.is_dir():
        parser.error(f"--json {a.json}: there is no folder {a.json.parent}")
    device = torch.device("cuda" if gpu else "cpu")
    rows: list[Row] = []
    for precision, schedule in product(a.precision, a.schedule):
        rows += measure(Training(a.preset, schedule, precision, 1, a.steps, a.height, a.width, device), a.capacity)
    Console(width=max(Console().width, 130)).print(table(rows))
    if a.json:
        a.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


def gibibytes(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise ValueError(text)
    return value


def measure(training: Training, capacities: list[float]) -> Iterator[Row]:
    t = training
    how = "cuda" if t.device.type == "cuda" else "predicted"
    peaks: dict[int, int] = {}

    def peak(batch: int) -> int:
        if batch not in peaks:
            steps = replace(t, batch=batch).train
            report = revflow.measure_memory(lambda: next(steps()), device=t.device, predict=how != "cuda")
            peaks[batch] = report.peak
        return peaks[batch]

    def fits(batch: int, limit: float) -> bool:
        return peak(batch) <= limit if how == "predicted" else not runs_out(lambda: peak(batch))

    for capacity in capacities:
        limit = capacity * GIB
        if how == "cuda":
            cap(t.device, limit)
            peaks.clear()  # what ran under another cap may not run under this one
        batch = largest(partial(fits, limit=limit), lambda: 1 + int((limit - peak(1)) / (peak(2) - peak(1))))  # noqa: B023
        timed = time_of(replace(t, batch=batch)) if how == "cuda" and batch else (None, None)
        yield Row(
            "crevnet", t.preset, t.schedule, t.precision, t.steps, t.height, t.width, capacity, how, batch,
            peaks.get(batch), *timed,
        )  # fmt: skip


def largest(fits: Callable[[int], bool], guess: Callable[[], int]) -> int:
    """The largest batch that fits, found from a guess; 0 if none does. `guess` is asked if batches of 1 and 2 fit."""
    if not fits(1):
        return 0
    if not fits(2):
        return 1
    batch = max(guess(), 2)
    while not fits(batch):
        batch -= 1
    while fits(batch + 1):
        batch += 1
    return batch


def cap(device: torch.device, limit: float) -> None:
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(limit / total, 1.0), device)


def runs_out(step: Callable[[], object]) -> bool:
    torch.cuda.empty_cache()  # of what a step before has left
    try:
        step()
    except torch.OutOfMemoryError:
        return True
    return False


def time_of(training: Training) -> tuple[float, float]:
    """Milliseconds a sequence, and the share of the device's rate of matrix products."""
    seconds = []
    steps = training.train()
    for _ in range(8):
        torch.cuda.synchronize(training.device)
        began = time.perf_counter()
        next(steps)
        torch.cuda.synchronize(training.device)
        seconds.append(time.perf_counter() - began)
    a_sequence = statistics.median(seconds[3:]) / training.batch
    dtype = torch.float16 if training.precision == "16-mixed" else torch.float32
    return 1e3 * a_sequence, operations(training) / a_sequence / throughput.matrix_rate(training.device, dtype)


def operations(training: Training) -> float:
    """Floating-point operations of a training step on one sequence."""
    with torch.device("meta"):
        one = replace(training, schedule="plain", batch=1, device=torch.device("meta"), precision="32-true")
        network, inputs = one.trainee()
        return throughput.operations(partial(one.loss, network, inputs))


def table(rows: list[Row]) -> Table:
    found = Table(title="The largest batch")
    columns = (
        "schedule",
        "precision",
        "steps",
        "frame",
        "capacity, GiB",
        "batch",
        "peak, GiB",
        "ms a sequence",
        "of matrix rate",
    )
    for name in (*columns, "how"):
        justify = "left" if name in ("schedule", "precision", "frame", "how") else "right"
        found.add_column(name, justify=justify, no_wrap=name == "schedule")
    for r in rows:
        found.add_row(
            r.schedule, r.precision, str(r.steps), f"{r.height} x {r.width}", f"{r.capacity:g}", str(r.batch),
            "" if r.peak is None else f"{r.peak / GIB:.2f}",
            "" if r.milliseconds is None else f"{r.milliseconds:,.0f}",
            "" if r.throughput is None else f"{r.throughput:.0%}",
            r.how,
        )  # fmt: skip
    return found


if __name__ == "__main__":
    main()
