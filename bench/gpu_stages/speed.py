"""Stage speed: a training step in each precision and layout, compiled and not, and its share of the rate of matrix products."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Sequence
from functools import partial

import torch

import speed
from gpu_stages.jobs import Job, each
from gpu_stages.stage import Row, Rows, Setup
from kit.libraries import PEERS
from kit.methods import checkpointed, reversible
from kit.precisions import set_precision

METHODS = [checkpointed(1), reversible("min"), reversible("max", "max")]

CREVNET = ((), ("tf32",), ("bf16-mixed",), ("bf16-mixed", "--channels-last"), ("tf32", "--channels-last"))
"""Precisions, float32 first, and layouts."""


def rows(setup: Setup) -> Rows:
    return each([*crevnet(setup), *convolutions(setup)])


def crevnet(setup: Setup) -> Iterable[Job]:
    height, width = setup.frame
    size = ["--preset", setup.preset, "--steps", 2 if setup.toy else 11, "--height", height, "--width", width]
    chosen = CREVNET if setup.device == "cuda" else ((), ("bf16-mixed", "--channels-last"))
    for how in chosen:
        arguments = [*size, "--schedule", "checkpoint", "reversible", *precision(*how)]
        yield job("crevnet", setup, speed.Extent(1 if setup.toy else 2, 2), arguments)


def convolutions(setup: Setup) -> Iterable[Job]:
    """Compiled on a GPU only: on a CPU a compiler takes minutes."""
    chosen = (("tf32",), ("tf32", "--compile"), ("bf16-mixed",), ("bf16-mixed", "--compile"))
    extent = speed.Extent(2, 2) if setup.toy else speed.Extent(16, 5)
    for how in chosen if setup.device == "cuda" else ((),):
        yield job("convolutions", setup, extent, ["--image", 4 if setup.toy else 56, *precision(*how)])


def precision(name: str = "32-true", *others: str) -> list[str]:
    return ["--precision", name, *others]


def job(name: str, setup: Setup, extent: speed.Extent, arguments: Sequence[object]) -> Job:
    options = speed.options([*map(str, arguments)])
    names = {"network": name, "precision": options.precision, "compiled": options.compile}
    names["channels_last"] = options.channels_last
    work = partial(compare, name, extent, options, torch.device(setup.device))
    return Job(names, work, may_fail=options.compile)


def compare(name: str, extent: speed.Extent, options: Namespace, device: torch.device) -> Iterable[Row]:
    torch.manual_seed(0)
    set_precision(options.precision)
    for row in speed.compare(name, extent, options, device, METHODS):
        if row.method not in PEERS:  # on CrevNet, the row of a library has only a note: no library applies to it
            yield {
                "network": row.network,
                "precision": row.precision,
                "compiled": row.compiled,
                "channels_last": row.channels_last,
                "method": row.method,
                "setting": row.setting,
                "seconds_per_step": row.seconds,
                "time_over_plain": row.time_ratio,
                "standard_error": row.error,
                "of_matrix_rate": row.throughput,
                "peak_bytes": row.peak,
                "size": row.size,
                "note": row.note,
            }
