"""Frames a second that CrevNet's training loader reads from day files, against those that its training step consumes.

    python bench/loading.py --json loading.json

Epochs of the loader of `crevnet fit` are measured, by wall time: workers are processes of their own. Every round makes new
loaders, in random order. The first epoch of each is cold: its workers are to be started and its files to be opened, which
the system's page cache does not hold (that of a virtual machine's host may). The second is warm.

The days are a synthetic city's, written in several ways. The competition's organisers handed out a function for files to be
handed in, which leaves chunks to h5py; the training days are taken to be such files. A chunk is then (18, 62, 55, 1): a window
of 12 slots decompresses 18 or 36, and its bytes are gathered one by one. `crevnet data synth` makes a chunk of each frame.
Uncompressed files show what remains: conversion, collation, and the way from the workers. `crevnet data repack` makes a chunk of
each frame as well, by Zstandard of hdf5plugin; beside it stand other codecs of hdf5plugin, where that is installed. Or take your
own: --data FOLDER.

The training step's rate, which has to be kept up with, is measured where there is CUDA. Elsewhere it is a bound that no step
reaches: its floating-point operations, those of standard autograd, at the peak rate of a V100. The batch and the precision are
those of configs/traffic4cast-v100-16g.yaml.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import mmap
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any, get_args

import h5py
import numpy as np
import torch

import capacity
import report
from crevnet import PRESETS
from crevnet.data.city_data import CityData
from crevnet.data.errors import DataError
from crevnet.data.files.days import DayFile, DayReader, open_days
from crevnet.data.made.repack import repack
from crevnet.data.made.synthetic import SyntheticCity, write_city
from crevnet.data.settings import DataSettings
from schedules import Precision, Training

try:
    import hdf5plugin
except ImportError:
    hdf5plugin = None

AS_DISTRIBUTED = "h5py's chunks"

V100_PEAK = {"32-true": 15.7, "16-mixed": 125.0}
"""TFLOP/s by NVIDIA's data sheet: of ordinary float32 arithmetic, and of tensor cores in float16."""


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
        """Windows a second, epoch after epoch."""
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
    """The median once more."""


@dataclass(frozen=True)
class Demand:
    """What a training step consumes."""

    windows_a_second: float
    source: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="day files as for crevnet fit; a synthetic city's if not given")
    parser.add_argument("--days", type=report.positive, default=1, help="read so many training days")
    parser.add_argument("--height", type=report.positive, default=495, help="of the synthetic city's frames")
    parser.add_argument("--width", type=report.positive, default=436)
    parser.add_argument("--density", type=float, default=1.0, help="of its traffic: 4 makes a third of the pixels busy")
    parser.add_argument("--windows", type=report.positive, default=56, help="windows of a day in an epoch, at most")
    parser.add_argument("--workers", type=natural, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch", type=report.positive, default=14)
    parser.add_argument("--rounds", type=report.positive, default=5)
    parser.add_argument("--preset", choices=PRESETS, default="paper", help="the model that is trained")
    parser.add_argument("--precision", choices=get_args(Precision), default="16-mixed", help="in which it is trained")
    parser.add_argument("--peak", type=report.positive, help="TFLOP/s of the device on which; a V100's if not given")
    report.add_outputs(parser, figure=False)
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
    verdicts = "\n".join(verdict(rows, demand(step, a.peak)))
    print(about)
    report.show(title, HEADINGS, map(cells, rows), LEFT)
    print(verdicts)
    if hdf5plugin is None:
        print("hdf5plugin is not installed, so no repacked files were read")
    table = report.markdown_table(HEADINGS, map(cells, rows), LEFT)
    report.write(a, rows, report.markdown("Loading day files", about, [f"{title}:", table, verdicts]))


def natural(text: str) -> int:
    """An option's type: a whole number from 0 on."""
    value = int(text)
    if value < 0:
        raise ValueError(text)
    return value


def day_folders(options: argparse.Namespace, temporary: Path) -> dict[str, Path]:
    """For each layout a folder with training days, in the temporary one."""
    a = options
    if a.data:
        for day in open_days(a.data)[: a.days]:
            place(day, temporary / "given").symlink_to(day.path.resolve())
        return {"as it is": temporary / "given"}
    city = SyntheticCity(height=a.height, width=a.width, training_days=a.days, validation_days=0, density=a.density)
    write_city(city, temporary / "city")
    folders = {"a frame a chunk": temporary / "city"}
    for day in open_days(temporary / "city"):
        for layout, options_of_h5py in layouts(day).items():
            folders[layout] = temporary / layout
            rewrite(day, place(day, folders[layout]), **options_of_h5py)
    if hdf5plugin is not None:
        folders["repacked"] = temporary / "repacked"
        repack(temporary / AS_DISTRIBUTED, folders["repacked"])
    return folders


def layouts(day: DayFile) -> dict[str, dict[str, Any]]:
    """Options of h5py's `create_dataset` for a day."""
    found: dict[str, dict[str, Any]] = {AS_DISTRIBUTED: {"compression": "gzip"}, "uncompressed": {}}
    if hdf5plugin is not None:
        frame = {"chunks": (1, *day.shape[1:])}
        found["LZ4"] = {**frame, **hdf5plugin.LZ4()}
        found["Blosc2 LZ4"] = {**frame, **hdf5plugin.Blosc2(cname="lz4")}
        found["Blosc2 Zstd"] = {**frame, **hdf5plugin.Blosc2(cname="zstd")}
    return found


def place(day: DayFile, root: Path) -> Path:
    """Where `root` holds a training day."""
    folder = root / day.city / f"{day.city}_training"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / day.path.name


def rewrite(day: DayFile, path: Path, **options: Any) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("array", data=DayReader().read(day, 0, day.shape[0]), **options)


def city_data(root: Path, preset: str, windows: int, batch: int, workers: int) -> CityData:
    """What `crevnet fit` loads, from the middle of the days: windows that follow each other begin anywhere in a chunk."""
    model = PRESETS[preset]
    slots = min(day.shape[0] for day in open_days(root))
    held = min(windows + model.window - 1, slots)
    first = (slots - held) // 2
    settings = DataSettings(
        root, training_slots=(first, first + held), validation_split="training", batch_size=batch, workers=workers
    )
    return CityData(settings, model)


def measure(loaders: list[Loader], rounds: int, window: int) -> list[Row]:
    """Cold and warm epochs of every loader; warm ones alone where the system does not drop the files from its cache."""
    rates: list[dict[str, list[float]]] = [{"cold": [], "warm": []} for _ in loaders]
    order = random.Random(0)
    for _ in range(rounds):
        for number in order.sample(range(len(loaders)), len(loaders)):
            dropped = all([drop_from_cache(path) for path in loaders[number].paths])
            first, second = islice(loaders[number].epochs(), 2)
            if dropped:
                rates[number]["cold"].append(first)
            rates[number]["warm"].append(second)
    return [
        loader.row(cache, found, window)
        for loader, by_cache in zip(loaders, rates, strict=True)
        for cache, found in by_cache.items()
        if found
    ]


def drop_from_cache(path: Path) -> bool:
    """Drop a file from the system's page cache. False where that has not worked: not on Linux, say, or with a file in memory."""
    if not hasattr(os, "posix_fadvise"):
        return False
    with path.open("rb") as file:
        os.fsync(file.fileno())  # what is not on the disk yet stays
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as pages:
            return not any(in_memory(pages))


def in_memory(pages: mmap.mmap) -> bytes:
    """A byte for each page of a mapped file: 1 if the page cache holds it."""
    found = (ctypes.c_ubyte * math.ceil(len(pages) / mmap.PAGESIZE))()
    address = np.frombuffer(pages, np.uint8).ctypes.data
    if ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(pages)), found):
        raise OSError("mincore failed")
    return bytes(found)


def demand(step: Training, peak: int | None) -> Demand:
    """Windows a second of a training step: measured on CUDA, and elsewhere what `peak` TFLOP/s would allow."""
    if step.device.type == "cuda":
        return Demand(capacity.sequences_a_second(step), "measured here")
    teraflops = capacity.operations(step) / 1e12
    rate = peak or V100_PEAK[step.precision]
    return Demand(rate / teraflops, f"{teraflops:.1f} TFLOP a window at {rate:g} TFLOP/s, which no step reaches")


def verdict(rows: list[Row], needed: Demand) -> Iterator[str]:
    """What training consumes, and for each layout the number of workers that keep up with it, cold and warm."""
    yield f"training consumes {needed.windows_a_second:.3g} windows a second: {needed.source}"
    if not any(row.cache == "cold" for row in rows):
        yield "no cold epochs: the system did not drop the files from its cache"
    for layout in dict.fromkeys(row.layout for row in rows):
        rates: dict[int, float] = {}
        for row in rows:
            if row.layout == layout:
                rates[row.workers] = min(row.windows_a_second, rates.get(row.workers, math.inf))
        yield f"{layout}: {'; '.join(enough(rates, needed.windows_a_second))}"


def enough(rates: dict[int, float], needed: float) -> Iterator[str]:
    """What windows a second by the number of workers mean for training that consumes `needed`."""
    if 0 in rates:
        yield f"without workers loading adds {needed / rates[0]:.0%} to a step"
    counts = sorted(workers for workers in rates if workers)
    for workers in counts:
        if rates[workers] >= needed:
            yield f"{workers} {'worker is' if workers == 1 else 'workers are'} enough, with {rates[workers]:.3g} a second"
            return
    if counts:
        most = counts[-1]
        workers = "1 worker is" if most == 1 else f"{most} workers are"
        estimate = math.ceil(needed * most / rates[most])
        yield f"{workers} not enough, with {rates[most]:.3g} a second; {estimate} might be"


HEADINGS = ("layout", "KiB a frame", "workers", "cache", "frames/s", "windows/s", "slowest to fastest")
LEFT = ("layout", "cache")


def cells(row: Row) -> tuple[str, ...]:
    """The row below `HEADINGS`."""
    return (
        row.layout, f"{row.bytes_a_frame / 1024:,.0f}", str(row.workers), row.cache, f"{row.frames_a_second:,.0f}",
        f"{row.windows_a_second:.2f}", f"{row.slowest:.2f} to {row.fastest:.2f}",
    )  # fmt: skip


if __name__ == "__main__":
    main()
