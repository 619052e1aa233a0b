"""The largest batch that trains within a device's memory, and the sequences per second at that batch.

    python bench/capacity.py --capacity 16 32 --json capacity.json
    python bench/capacity.py --preset tiny --height 128 --width 112 --capacity 0.25 0.5 --time

On a CUDA device ("cuda") the process is capped to each capacity and batches are tried; out of memory is a result. At the
largest batch, training steps are timed. Their useful operations (those of standard autograd, without recomputation) are
compared with the device's measured rate of matrix products. Without a CUDA device ("predicted"), peaks are counted under fake
tensors, and the batch is the largest whose peak is within the capacity. A device needs more: convolutions' workspaces, the
allocator's gaps and half a GiB of CUDA's own. Choose a lower capacity than the device has. --time trains that batch on the CPU,
in the process's own time.

Models and schedules are those of bench/memory.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import get_args

import torch

import revflow
from crevnet import MODELS, PRESETS
from kit import rates
from kit.device_memory import cap, free, ran_out
from kit.memory_row import GIB
from kit.schedules import PATCHED, SCHEDULES, Precision, Training
from pages import report
from pages.tables import markdown_table, show


@dataclass(frozen=True)
class Row:
    """The result of a schedule within a capacity."""

    model: str
    preset: str
    schedule: str
    precision: str
    patch: int
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
    sequences_a_second: float | None = None
    """In training, at that batch."""
    throughput: float | None = None
    """Useful operations per second, as a share of the rate of matrix products in the same precision; on CUDA."""


HEADINGS = (
    "model",
    "schedule",
    "precision",
    "capacity, GiB",
    "batch",
    "peak, GiB",
    "sequences per second",
    "of matrix rate",
)
LEFT = ("model", "schedule", "precision")


def main() -> None:
    a = options()
    torch.set_num_threads(1)
    device = report.device_here()
    rows: list[Row] = []
    for precision, model, schedule in product(a.precision, a.only, a.schedule):
        if model == "crevnet" or schedule in ("plain", "checkpoint"):
            patch = a.patch if model in PATCHED else 1
            training = Training(
                a.preset, schedule, precision, 1, a.steps, a.height, a.width, device, model=model, patch=patch
            )
            rows += measure(training, a.capacity, a.time or device.type == "cuda", a.rounds)
    title = f"The largest batch, {rows[0].how}: {a.steps} time steps of {a.height} x {a.width}"
    lines = [cells(row) for row in rows]
    about = report.machine(device)
    print(about)
    show(title, HEADINGS, lines, LEFT)
    report.write(a, rows, report.markdown(title, about, [markdown_table(HEADINGS, lines, LEFT)]))


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    schedules = [*SCHEDULES]
    listed = f"schedules to train: {', '.join(schedules)} (all)"
    parser.add_argument("--only", nargs="+", choices=MODELS, default=["crevnet"], help="models to train (crevnet)")
    parser.add_argument("--preset", choices=PRESETS, default="paper", help="preset of CrevNet (paper)")
    parser.add_argument(
        "--patch", type=report.positive, default=4, help="patch of ConvLSTM, PredRNN and PredRNN++, pixels (4)"
    )
    parser.add_argument("--schedule", nargs="+", choices=schedules, default=schedules, metavar="SCHEDULE", help=listed)
    parser.add_argument(
        "--precision", nargs="+", choices=get_args(Precision), default=["32-true"], help="precisions (32-true)"
    )
    parser.add_argument("--capacity", nargs="+", type=gibibytes, default=[16.0, 32.0], help="capacities, GiB (16 32)")
    parser.add_argument("--steps", type=report.positive, default=11, help="number of time steps (11)")
    parser.add_argument("--height", type=report.positive, default=495, help="height of the frames, pixels (495)")
    parser.add_argument("--width", type=report.positive, default=436, help="width of the frames, pixels (436)")
    parser.add_argument("--time", action="store_true", help="timing of that batch on the CPU; a GPU always times it")
    parser.add_argument(
        "--rounds", type=report.positive, default=5, help="number of timed steps, after a first one (5)"
    )
    report.add_outputs(parser, figure=False)
    a = parser.parse_args()
    if set(a.only) != {"crevnet"} and not {"plain", "checkpoint"} & {*a.schedule}:
        parser.error(
            f"--schedule {' '.join(a.schedule)}: only CrevNet has these; choose plain or checkpoint for other models"
        )
    return a


def gibibytes(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise ValueError(text)
    return value


def measure(training: Training, capacities: list[float], timed: bool, rounds: int) -> Iterator[Row]:
    found = tried if training.device.type == "cuda" else predicted
    for capacity, batch, peak in found(training, capacities):
        t = replace(training, batch=batch)
        row = Row(
            t.model, t.preset if t.model == "crevnet" else "", t.schedule, t.precision, t.patch, t.steps, t.height,
            t.width, capacity, "cuda" if found is tried else "predicted", batch, peak,
        )  # fmt: skip
        yield trained(row, t, rounds) if timed and batch else row


def trained(row: Row, training: Training, rounds: int) -> Row:
    """With the pace at the row's batch, or at the largest below it: a second step may run out of memory after a first one."""
    pace: list[float] = []

    def step() -> None:
        pace.append(rates.sequences_per_second(training, rounds))

    while runs_out(step):
        training = replace(training, batch=training.batch - 1)
        if not training.batch:
            return replace(row, batch=0, peak=None)
    if training.batch < row.batch:
        row = replace(row, batch=training.batch, peak=peak_of(training))
    free()
    return replace(row, sequences_a_second=pace[0], throughput=rates.share_of_matrix_rate(training, pace[0]))


def peak_of(training: Training) -> int:
    """The peak of a first step, in bytes."""
    return revflow.measure_memory(lambda: next(training.train()), device=training.device).peak


def predicted(training: Training, capacities: list[float]) -> Iterator[tuple[float, int, int | None]]:
    """Each capacity's largest batch, and its peak."""
    memory = revflow.predict_memory(lambda batch: next(replace(training, batch=batch).train()))
    for capacity in capacities:
        batch = memory.largest_batch(int(capacity * GIB))
        yield capacity, batch, memory.peak(batch) if batch else None


def tried(training: Training, capacities: list[float]) -> Iterator[tuple[float, int, int | None]]:
    """Each capacity's largest batch, and its peak, on a GPU whose memory is capped."""
    for capacity in capacities:
        peaks: dict[int, int] = {}  # a batch that fits under another cap may not fit under this one
        cap(training.device, capacity * GIB)

        def fits(batch: int, peaks: dict[int, int] = peaks) -> bool:
            its = replace(training, batch=batch)
            return batch in peaks or not runs_out(lambda: peaks.update({batch: peak_of(its)}))

        def guess(limit: float = capacity * GIB, peaks: dict[int, int] = peaks) -> int:
            return 1 + int((limit - peaks[1]) / (peaks[2] - peaks[1]))

        batch = largest(fits, guess)
        yield capacity, batch, peaks.get(batch)


def largest(fits: Callable[[int], bool], guess: Callable[[], int]) -> int:
    """The largest batch that fits, found from a guess; 0 if none does. `guess` is called if batches of 1 and 2 fit."""
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


def runs_out(step: Callable[[], object]) -> bool:
    free()
    try:
        step()
    except RuntimeError as error:
        if ran_out(error):
            return True
        raise
    return False


def cells(r: Row) -> tuple[str, ...]:
    model = f"{r.model} {r.preset}" if r.preset else f"{r.model}, patch {r.patch}"
    peak = "" if r.peak is None else f"{r.peak / GIB:.2f}"
    rate = "" if r.sequences_a_second is None else f"{r.sequences_a_second:,.3g}"
    share = "" if r.throughput is None else f"{r.throughput:.0%}"
    return model, r.schedule, r.precision, f"{r.capacity:g}", str(r.batch), peak, rate, share


if __name__ == "__main__":
    main()
