"""Stage loading: windows per second of the training loader, by its workers, next to the pace of stage training."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch

import loading
from crevnet import PRESETS
from crevnet.data.files.days import open_days
from gpu_stages.days import city
from gpu_stages.jobs import Job, each
from gpu_stages.stage import Row, Rows, Setup
from kit.day_layouts import AS_DISTRIBUTED, FRAME_PER_CHUNK, place, rewrite
from kit.schedules import Training


def rows(setup: Setup) -> Rows:
    needed, source = pace(setup)
    made = city(setup)
    repeated = setup.work / "h5py"
    jobs = [
        Job({"layout": FRAME_PER_CHUNK}, partial(measured, made, setup, needed, source)),
        Job({"layout": AS_DISTRIBUTED}, lambda: measured(as_distributed(made, repeated), setup, needed, source)),
    ]
    return each(jobs)


def pace(setup: Setup) -> tuple[float, str]:
    """Windows per second that training consumes, and the source of that figure."""
    path = setup.out / "training.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if (found.get("device"), found.get("toy")) == (setup.device, setup.toy):
        paces = [row["sequences_per_second"] for row in found["rows"] if row.get("sequences_per_second")]
        if paces:
            return max(paces), "stage training"
    height, width = setup.frame
    batch, steps = (2, 2) if setup.toy else (14, 11)
    step = Training(setup.preset, "reversible", "16-mixed", batch, steps, height, width, torch.device(setup.device))
    needed = loading.demand(step, None)
    return needed.windows_a_second, needed.source


def as_distributed(made: Path, root: Path) -> Path:
    """The same days in h5py's own chunks, which are assumed of the competition's files."""
    for day in open_days(made):
        rewrite(day, place(day, root), compression="gzip")
    return root


def measured(root: Path, setup: Setup, needed: float, source: str) -> Iterable[Row]:
    layout = AS_DISTRIBUTED if root.name == "h5py" else FRAME_PER_CHUNK
    windows, counts = (4, (0, 1)) if setup.toy else (32, (0, 1, 2, 4, 8))
    loaders = [
        loading.Loader(layout, loading.city_data(root, setup.preset, windows, 2, workers), workers)
        for workers in counts
    ]
    for row in loading.measure(loaders, 1, PRESETS[setup.preset].window):
        yield {
            "layout": row.layout,
            "workers": row.workers,
            "cache": row.cache,
            "windows_per_second": row.windows_a_second,
            "frames_per_second": row.frames_a_second,
            "training_consumes": needed,
            "is_enough": row.windows_a_second >= needed,
            "consumption_from": source,
        }
