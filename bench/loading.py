"""Frames per second that CrevNet's training loader reads from day files, compared with those that a training step consumes.

    python bench/loading.py --json loading.json

The benchmark measures epochs of the loader of `crevnet fit` by wall time, as workers are processes of their own. Every round
makes new loaders, in random order. The first epoch of each is cold: it must start its workers and open its files, which are not
in the system's page cache (that of a virtual machine's host may have them). The second is warm.

The days are a synthetic city's, written in several layouts (bench/kit/day_layouts.py). The competition's organizers distributed
a function for files to submit, which leaves the choice of chunks to h5py. The training days are assumed to be such files. A
chunk is then (18, 62, 55, 1): a window of 12 time steps decompresses 18 or 36, and gathers its bytes one by one. `crevnet data
synth` writes one frame per chunk. Uncompressed files show the rest of the cost: conversion, collation, and the transfer from
the workers. `crevnet data repack` also writes one frame per chunk, by Zstandard of hdf5plugin. If hdf5plugin is installed, its
other codecs are measured too. --data FOLDER reads your own files.

The pace of the training step is measured on CUDA. Elsewhere it is a bound that no step reaches: its floating-point operations,
those of standard autograd, at the peak rate of a V100. The batch and the precision are those of
configs/traffic4cast-v100-16g.yaml.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import get_args

import torch

from crevnet import PRESETS
from crevnet.data.city_data import CityData
from crevnet.data.errors import DataError
from crevnet.data.files.days import open_days
from crevnet.data.made.synthetic import SyntheticCity
from crevnet.data.settings import DataSettings
from kit import rates
from kit.day_layouts import linked, written
from kit.page_cache import drop_from_cache
from kit.schedules import Precision, Training
from pages import report
from pages.tables import markdown_table, show

V100_PEAK = {"32-true": 15.7, "16-mixed": 125.0}
"""TFLOP/s by NVIDIA's data sheet: of float32 arithmetic, and of tensor cores in float16."""


@dataclass(frozen=True)
class Loader:
    """The training loader of some day files."""

    layout: str
    data: CityData
    workers: int

    @property
    def paths(self) -> list[Path]:
        return [day.path for day in self.data.training_days]

    def epochs(self) -> Iterator[float]:
        """Windows per second of one epoch after the other."""
        batches = self.data.training_batches()
        while True:
            began = time.perf_counter()
            windows = sum(len(batch["frames"]) for batch in batches)
            yield windows / (time.perf_counter() - began)

    def row(self, cache: str, rates: list[float], window: int) -> Row:
        size = sum(path.stat().st_size for path in self.paths) / sum(day.shape[0] for day in self.data.training_days)
        median = statistics.median(rates)
        return Row(self.layout, size, self.workers, cache, median, min(rates), max(rates), window * median)


@dataclass(frozen=True)
class Row:
    """A loader's epochs of one kind."""

    layout: str
    bytes_a_frame: float
    """On disk."""
    workers: int
    """0 reads in the training process."""
    cache: str
    """cold or warm."""
    windows_a_second: float
    """The rounds' median."""
    slowest: float
    fastest: float
    frames_a_second: float
    """The same median, in frames."""


@dataclass(frozen=True)
class Demand:
    """Consumption of a training step."""

    windows_a_second: float
    source: str


def main() -> None:
    parser = options()
    a = parser.parse_args()
    window = PRESETS[a.preset].window
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CREVNET_CACHE"] = folder  # of road maps
        try:
            loaders = [
                Loader(layout, city_data(root, a.preset, a.windows, a.batch, workers), workers)
                for (layout, root), workers in product(day_folders(a, Path(folder)).items(), a.workers)
            ]
            rows = measure(loaders, a.rounds, window)
        except (DataError, ValueError) as error:
            parser.error(" ".join(str(error).split()))
    _, height, width, _ = loaders[0].data.training_days[0].shape
    device = report.device_here()
    step = Training(a.preset, "reversible", a.precision, a.batch, window - 1, height, width, device)
    title = f"Batches of {a.batch} windows of {window} frames of {height} x {width}, {a.rounds} rounds"
    about = f"{os.cpu_count()} CPU cores, {report.machine(device, torch.get_num_threads(), ['h5py', 'numpy'])}"
    verdicts = [*verdict(rows, demand(step, a.peak))]
    print(about)
    show(title, HEADINGS, map(cells, rows), LEFT)
    print("\n".join(verdicts))
    if not a.data and "repacked" not in {row.layout for row in rows}:
        print("hdf5plugin is not installed, so no repacked files were read")
    table, listed = markdown_table(HEADINGS, map(cells, rows), LEFT), "\n".join(f"- {line}" for line in verdicts)
    report.write(a, rows, report.markdown("Loading day files", about, [f"{title}:", table, listed]))


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number = partial(parser.add_argument, type=report.positive)
    parser.add_argument("--data", type=Path, help="folder of day files as for crevnet fit (a synthetic city's)")
    number("--days", default=1, help="number of training days to read (1)")
    number("--height", default=495, help="height of the synthetic city's frames, pixels (495)")
    number("--width", default=436, help="width of the synthetic city's frames, pixels (436)")
    parser.add_argument(
        "--density", type=float, default=1.0, help="density of its traffic; at 4, a third of the pixels is busy (1)"
    )
    number("--windows", default=56, help="maximum number of windows of a day per epoch (56)")
    parser.add_argument("--workers", type=natural, nargs="+", default=[0, 1, 2], help="numbers of workers (0 1 2)")
    number("--batch", default=14, help="batch size, windows (14)")
    number("--rounds", default=5, help="number of rounds (5)")
    parser.add_argument("--preset", choices=PRESETS, default="paper", help="preset of the model in training (paper)")
    parser.add_argument(
        "--precision", choices=get_args(Precision), default="16-mixed", help="precision of that training (16-mixed)"
    )
    number("--peak", help="peak rate of the device of that training, TFLOP/s (a V100's)")
    report.add_outputs(parser, figure=False)
    return parser


def natural(text: str) -> int:
    """An option's type: a whole number from 0 on."""
    value = int(text)
    if value < 0:
        raise ValueError(text)
    return value


def day_folders(a: argparse.Namespace, temporary: Path) -> dict[str, Path]:
    """A folder with training days for each layout, in the temporary one."""
    if a.data:
        return linked(a.data, a.days, temporary / "given")
    city = SyntheticCity(height=a.height, width=a.width, training_days=a.days, validation_days=0, density=a.density)
    return written(city, temporary)


def city_data(root: Path, preset: str, windows: int, batch: int, workers: int) -> CityData:
    """The data of `crevnet fit`, from the middle of the days: consecutive windows begin anywhere in a chunk."""
    model = PRESETS[preset]
    slots = min(day.shape[0] for day in open_days(root))
    count = min(windows + model.window - 1, slots)
    first = (slots - count) // 2
    settings = DataSettings(
        root, training_slots=(first, first + count), validation_split="training", batch_size=batch, workers=workers
    )
    return CityData(settings, model)


def measure(loaders: list[Loader], rounds: int, window: int) -> list[Row]:
    """Cold and warm epochs of every loader. Only warm ones if the system does not drop the files from its cache."""
    pace: list[dict[str, list[float]]] = [{"cold": [], "warm": []} for _ in loaders]
    order = random.Random(0)
    for _ in range(rounds):
        for number in order.sample(range(len(loaders)), len(loaders)):
            dropped = all([drop_from_cache(path) for path in loaders[number].paths])
            first, second = islice(loaders[number].epochs(), 2)
            if dropped:
                pace[number]["cold"].append(first)
            pace[number]["warm"].append(second)
    return [
        loader.row(cache, found, window)
        for loader, by_cache in zip(loaders, pace, strict=True)
        for cache, found in by_cache.items()
        if found
    ]


def demand(step: Training, peak: int | None) -> Demand:
    """Windows per second of a training step: measured on CUDA, and elsewhere the bound of `peak` TFLOP/s."""
    if step.device.type == "cuda":
        return Demand(rates.sequences_per_second(step), "measured here")
    teraflops = rates.operations_per_sequence(step) / 1e12
    rate = peak or V100_PEAK[step.precision]
    return Demand(rate / teraflops, f"{teraflops:.1f} TFLOP per window at {rate:g} TFLOP/s, which no step reaches")


def verdict(rows: list[Row], needed: Demand) -> Iterator[str]:
    """The consumption of training, and for each layout the number of workers that keep up with it, cold and warm."""
    yield f"training consumes {needed.windows_a_second:.3g} windows per second: {needed.source}"
    if not any(row.cache == "cold" for row in rows):
        yield "no cold epochs: the system did not drop the files from its cache"
    for layout in dict.fromkeys(row.layout for row in rows):
        slowest: dict[int, float] = {}
        for row in rows:
            if row.layout == layout:
                slowest[row.workers] = min(row.windows_a_second, slowest.get(row.workers, math.inf))
        yield f"{layout}: {'; '.join(enough(slowest, needed.windows_a_second))}"


def enough(found: dict[int, float], needed: float) -> Iterator[str]:
    """Whether windows per second, by the number of workers, suffice for training that consumes `needed`."""
    if 0 in found:
        yield f"without workers loading adds {needed / found[0]:.0%} to a step"
    counts = sorted(workers for workers in found if workers)
    for workers in counts:
        if found[workers] >= needed:
            yield f"{workers} {'worker is' if workers == 1 else 'workers are'} enough, with {found[workers]:.3g} per second"
            return
    if counts:
        most = counts[-1]
        count = "1 worker is" if most == 1 else f"{most} workers are"
        estimate = math.ceil(needed * most / found[most])
        yield f"{count} not enough, with {found[most]:.3g} per second; {estimate} might be"


HEADINGS = ("layout", "KiB per frame", "workers", "cache", "frames/s", "windows/s", "slowest to fastest")
LEFT = ("layout", "cache")


def cells(row: Row) -> tuple[str, ...]:
    """The row below `HEADINGS`."""
    return (
        row.layout, f"{row.bytes_a_frame / 1024:,.0f}", str(row.workers), row.cache, f"{row.frames_a_second:,.0f}",
        f"{row.windows_a_second:.2f}", f"{row.slowest:.2f} to {row.fastest:.2f}",
    )  # fmt: skip


if __name__ == "__main__":
    main()
