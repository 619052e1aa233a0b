"""What a training step of CrevNet takes in memory, under each schedule: see bench/schedules.py.

    python bench/memory.py --only crevnet --preset paper --steps 3 7 11 --json memory.json

A step is forward, backward and fused Adam, with Adam's state there before it. Rows say how they were measured:
"cuda" by the allocator's counters; "tracked" by the live tensors of a real step on the CPU; "predicted" by the same count
under fake tensors, which have shapes and no data: any size, nothing allocated. Without a GPU figures are predicted, unless
--how says otherwise. Predicted and tracked bytes are equal.

Activations are what the forward pass keeps, beside the window of frames; gradients are counted as one more set of
parameters, Adam's state as two; transient is what the peak holds beyond all of these. States that are offloaded are not on
the device, and not counted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import get_args

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import revflow
from crevnet import PRESETS
from schedules import SCHEDULES, Precision, Training


@dataclass(frozen=True)
class Row:
    """One training step; sizes in pixels, memory in bytes."""

    model: str
    preset: str
    schedule: str
    precision: str
    patch: int
    batch: int
    steps: int
    height: int
    width: int
    how: str
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    transient: int
    peak: int


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=["crevnet"], default=["crevnet"], help="models")
    parser.add_argument("--preset", nargs="+", choices=PRESETS, default=["paper"])
    parser.add_argument("--schedule", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    parser.add_argument("--precision", choices=get_args(Precision), default="32-true")
    parser.add_argument("--steps", nargs="+", type=positive, default=[3, 7, 11], help="time steps")
    parser.add_argument("--batch", nargs="+", type=positive, default=[1])
    parser.add_argument("--height", type=positive, default=495)
    parser.add_argument("--width", type=positive, default=436)
    parser.add_argument("--how", choices=["cuda", "tracked", "predicted"], default="cuda" if gpu else "predicted")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    a = parser.parse_args()
    if a.how == "cuda" and not gpu:
        parser.error("--how cuda: there is no CUDA device here; predicted figures need none")
    if a.json and not a.json.parent.is_dir():
        parser.error(f"--json {a.json}: there is no folder {a.json.parent}")
    rows = []
    device = torch.device("cuda" if a.how == "cuda" else "cpu")
    for preset, schedule, batch, steps in product(a.preset, a.schedule, a.batch, a.steps):
        rows.append(measure(Training(preset, schedule, a.precision, batch, steps, a.height, a.width, device), a.how))
    Console(width=max(Console().width, 150)).print(table(rows))
    for line in slopes(rows):
        print(line)
    if a.json:
        a.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def measure(training: Training, how: str) -> Row:
    t, kept = training, []

    def watch(forward: Callable[[], Tensor]) -> Tensor:
        losses: list[Tensor] = []
        kept.append(revflow.measure_memory(lambda: losses.append(forward()), device=t.device).kept)
        return losses[0]

    peak = revflow.measure_memory(lambda: next(t.train(watch)), device=t.device, predict=how == "predicted").peak
    parameters = t.parameters()
    sizes = (parameters, parameters, 2 * parameters, kept[0], max(peak - 4 * parameters - kept[0], 0), peak)
    return Row("crevnet", t.preset, t.schedule, t.precision, 1, t.batch, t.steps, t.height, t.width, how, *sizes)


def table(rows: list[Row]) -> Table:
    what = ("parameters", "gradients", "optimizer", "activations", "transient", "peak")
    found = Table(title="MiB of a training step")
    for name in ("model", "preset", "schedule", "precision", "batch", "steps", "frame", *what, "how"):
        justify = "right" if name in (*what, "batch", "steps") else "left"
        found.add_column(name, justify=justify, no_wrap=name in ("schedule", "how"))
    for r in rows:
        sizes = [f"{getattr(r, name) / 2**20:,.1f}" for name in what]
        frame = f"{r.height} x {r.width}"
        found.add_row(r.model, r.preset, r.schedule, r.precision, str(r.batch), str(r.steps), frame, *sizes, r.how)
    return found


def slopes(rows: list[Row]) -> Iterator[str]:
    """What one more time step of one more sequence takes, where two numbers of steps were measured."""
    for key in dict.fromkeys((r.preset, r.schedule, r.batch) for r in rows):
        same = sorted((r for r in rows if (r.preset, r.schedule, r.batch) == key), key=lambda r: r.steps)
        count = (same[-1].steps - same[0].steps) * key[2]
        if count:
            kept, peak = ((getattr(same[-1], n) - getattr(same[0], n)) / count for n in ("activations", "peak"))
            name = f"{key[0]}, {key[1]}, batch {key[2]}"
            yield f"{name}: a time step of a sequence keeps {kept / 2**20:.2f} MiB; the peak grows by {peak / 2**20:.2f}"


if __name__ == "__main__":
    main()
