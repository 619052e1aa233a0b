"""Stage memory: the allocator's peak of a training step next to the predicted bytes of the same step.

The difference of a CrevNet row is the sum of its parts:

- operators: live tensors at their peak in a real step on the device, less the predicted ones: an operator's own tensors there.
- workspace: the requested bytes at their peak, less live tensors: the memory of cuDNN and cuBLAS outside of tensors.
- rounding: the allocator's blocks, less the requested bytes.
- cached: reserved memory, less blocks: gaps between blocks, and freed blocks that await their next use.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import torch

import memory
import revflow
from crevnet import MODELS
from gpu_stages.stage import Row, Rows, Setup
from kit import memory_row
from kit.device_memory import free
from kit.schedules import PATCHED, Training

CREVNET = ("plain", "checkpoint", "reversible", "reversible-bfloat16", "reversible-every-3")
PREDICTING = 8
"""Processes at most, next to the measurements."""


def rows(setup: Setup) -> Rows:
    chosen = [*trainings(setup)]
    cpu = torch.device("cpu")
    workers = min(os.cpu_count() or 1, PREDICTING)
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        predictions = [
            pool.submit(memory.predicted, replace(training, device=cpu), [training.batch]) for training in chosen
        ]
        _warm_up(torch.device(setup.device))
        for training, prediction in zip(chosen, predictions, strict=True):
            yield compared(training, prediction)


def trainings(setup: Setup) -> Iterator[Training]:
    """CrevNet first, then the papers' patches, and last those that take longest or do not fit."""
    height, width = setup.frame
    few, longest = ((1, 3), 2) if setup.toy else ((3, 7), 11)
    base = Training(setup.preset, "plain", "32-true", 1, longest, height, width, torch.device(setup.device))
    for steps in few:
        for schedule in CREVNET:
            yield replace(base, schedule=schedule, steps=steps)
    for preset in (setup.preset,) if setup.toy else ("paper", "authors"):
        for schedule in ("plain", "checkpoint", "reversible-autoencoder", "reversible"):
            yield replace(base, preset=preset, schedule=schedule)
    others = [model for model in MODELS if model not in ("crevnet", "vpn", *PATCHED)]
    sizes = [*((model, 4) for model in PATCHED), *((model, 1) for model in others)]
    if not setup.toy:
        sizes += [(model, patch) for patch in (2, 1) for model in PATCHED]
    for model, patch in [*sizes, ("vpn", 1)]:
        for schedule in ("checkpoint",) if setup.toy else ("checkpoint", "plain"):
            yield replace(base, model=model, patch=patch, schedule=schedule, preset="paper")


def compared(training: Training, prediction: Future[list[memory_row.Row]]) -> Row:
    is_cuda = training.device.type == "cuda"
    found = memory.on_cuda(training) if is_cuda else memory.tracked(training)
    notes = [found.note] if found.note else []
    predicted = None
    try:
        predicted = prediction.result().pop().peak
    except Exception as error:
        notes.append(f"not predicted: {error}")
    row = {
        "model": training.model,
        "setting": training.preset if training.model == "crevnet" else f"patch {training.patch}",
        "schedule": training.schedule,
        "steps": training.steps,
        "predicted_bytes": predicted,
        "requested_bytes": found.peak,
        "difference_bytes": less(found.peak, predicted),
        "first_step_bytes": found.first,
        "reserved_bytes": found.reserved,
        "rounding_bytes": less(found.allocated, found.peak),
        "cached_bytes": less(found.reserved, found.allocated),
    }
    if training.model == "crevnet":
        live = live_tensors(training, notes)
        row |= {"operators_bytes": less(live, predicted), "workspace_bytes": less(found.peak, live)}
    return {**row, "note": "; ".join(notes)}


def less(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one - other


def live_tensors(training: Training, notes: list[str]) -> int | None:
    """The peak of a real step's tensors, on any device."""
    free()
    try:
        return revflow.measure_memory(lambda: next(training.train())).peak
    except RuntimeError as error:
        notes.append(f"live tensors not counted: {error}")
        return None


def _warm_up(device: torch.device) -> None:
    """Make cuBLAS allocate its workspace, which stays from the first product on, before the first row."""
    x = torch.ones(64, 64, device=device, requires_grad=True)
    torch.nn.functional.linear(x, x, x[0]).sum().backward()
