"""Stage capacity: the largest batch that trains within a memory cap, and the pace at it."""

from __future__ import annotations

from dataclasses import asdict
from itertools import product

import torch

import capacity
from gpu_stages.stage import Rows, Setup
from kit.precisions import set_precision
from kit.schedules import Training

SCHEDULES = ("reversible", "plain", "checkpoint")
NAMES = {"capacity": "capacity_GiB", "peak": "peak_bytes", "sequences_a_second": "sequences_per_second"}


def rows(setup: Setup) -> Rows:
    """In TF32, the default arithmetic of convolutions on CUDA, also for the matrix rate."""
    height, width = setup.frame
    set_precision("tf32")
    device = torch.device(setup.device)
    for gibibytes, schedule in product((0.012, 0.015) if setup.toy else (16.0, 32.0), SCHEDULES):
        training = Training(setup.preset, schedule, "32-true", 1, 3 if setup.toy else 11, height, width, device)
        for row in capacity.measure(training, [gibibytes], timed=True, rounds=2):
            fields = asdict(row) | {"precision": "tf32" if device.type == "cuda" else row.precision}
            fields["of_matrix_rate"] = fields.pop("throughput")
            yield {NAMES.get(name, name): value for name, value in fields.items()}
