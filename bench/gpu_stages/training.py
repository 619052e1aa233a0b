"""Stage training: configs/traffic4cast-v100-16g.yaml on a synthetic day under a 16 GiB cap, stopped, resumed, and in bfloat16.

If the configuration's batch runs out of memory, that is a row, and a smaller batch is tried.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from crevnet import PRESETS, CrevNetConfig
from crevnet.data.settings import DataSettings
from crevnet.training.settings import RunSettings, TrainingSettings
from crevnet.training.trainer import train
from gpu_stages.days import city
from gpu_stages.jobs import Job, each
from gpu_stages.stage import Row, Rows, Setup
from kit.device_memory import cap, free, ran_out

CONFIG = Path(__file__).parents[2] / "configs" / "traffic4cast-v100-16g.yaml"
GIB = 2**30
CAPACITY = 16
SMALLER = 3
"""Number of windows by which a batch that does not fit is reduced."""


def rows(setup: Setup) -> Rows:
    base = settings(setup)
    if setup.device == "cuda":
        cap(torch.device(setup.device), CAPACITY * GIB)
    first, resumed, bfloat16 = (2, 4, 2) if setup.toy else (40, 50, 10)
    precision = base.training.precision
    in_bfloat16 = replace(base, training=replace(base.training, precision="bf16-mixed"))
    jobs = [
        Job({"run": precision}, partial(stopped_and_resumed, base, setup, first, resumed)),
        Job({"run": "bf16-mixed"}, partial(fitting, in_bfloat16, setup, bfloat16)),
    ]
    return each(jobs)


def settings(setup: Setup) -> RunSettings:
    """Those of the configuration file, for the synthetic city. A few windows of the day are for validation."""
    found = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    model = PRESETS["tiny"] if setup.toy else CrevNetConfig(**found.get("model", {}))
    if isinstance(model, CrevNetConfig):
        model = replace(model, memory_budget="min")
    data = DataSettings(
        **found["data"] | ({"batch_size": 2, "workers": 0} if setup.toy else {}),
        root=city(setup),
        training_slots=(96, 240),
        validation_split="training",
        validation_slots=(240, 264),
    )
    training = TrainingSettings(**found["training"], validation_batches=1, checkpoint_minutes=60)
    if setup.device == "cpu":
        training = replace(training, accelerator="cpu")
    return RunSettings(model, data, training)


def stopped_and_resumed(base: RunSettings, setup: Setup, first: float, resumed: float) -> Iterable[Row]:
    batch = 0
    for row in fitting(base, setup, first):
        yield row
        batch = row["batch"]
    if not row["note"]:
        base = replace(base, data=replace(base.data, batch_size=batch))
        yield run(base, folder_of(base, setup), resumed, resume=True)
        shutil.rmtree(folder_of(base, setup))  # gigabytes


def fitting(base: RunSettings, setup: Setup, seconds: float) -> Iterable[Row]:
    """A row for each batch that does not fit, and then one for a batch that does."""
    while base.data.batch_size > 0:
        free()
        try:
            yield run(base, folder_of(base, setup), seconds)
            return
        except Exception as error:
            if not ran_out(error):
                raise
        shutil.rmtree(folder_of(base, setup), ignore_errors=True)
        yield {**empty(base), "note": f"out of memory within {CAPACITY} GiB"}
        base = replace(base, data=replace(base.data, batch_size=max(base.data.batch_size - SMALLER, 0)))


def folder_of(base: RunSettings, setup: Setup) -> Path:
    return setup.work / f"{base.training.precision}-{base.data.batch_size}"


def run(base: RunSettings, folder: Path, seconds: float, resume: bool = False) -> Row:
    """Train until this many seconds have passed, with those before a resumption."""
    before = len(losses(folder))
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    training = replace(base.training, max_minutes=seconds / 60)
    score = train(replace(base, training=training), folder, resume)
    wall = time.perf_counter() - began
    steps = losses(folder)[before:]
    times = [later.wall_time - earlier.wall_time for earlier, later in pairwise(steps)]
    return {
        **empty(base),
        "run": base.training.precision + ", resumed" * resume,
        "steps": len(steps),
        "first_step": steps[0].step if steps else None,
        "sequences_per_second": base.data.batch_size / statistics.median(times) if times else None,
        "loss_at_start": steps[0].value if steps else None,
        "loss_at_end": statistics.fmean(event.value for event in steps[-3:]) if steps else None,
        "validation": score,
        "reserved_bytes": torch.cuda.max_memory_reserved() if torch.cuda.is_initialized() else None,
        "wall_seconds": wall,
    }


def empty(base: RunSettings) -> Row:
    """A row's names without values."""
    values = ("steps", "first_step", "sequences_per_second", "loss_at_start", "loss_at_end", "validation")
    row: Row = {"run": base.training.precision, "batch": base.data.batch_size, **dict.fromkeys(values)}
    return row | {"reserved_bytes": None, "wall_seconds": None, "note": ""}


def losses(folder: Path) -> list[Any]:
    """TensorBoard's events of the training loss, one per step."""
    if not (folder / "tensorboard").is_dir():
        return []
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [*events.Scalars("train/loss")] if "train/loss" in events.Tags()["scalars"] else []
