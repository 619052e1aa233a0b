"""Layouts of day files for bench/loading.py: a synthetic city's days, written with several chunks and codecs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py

from crevnet.data.files.days import DayFile, DayReader, open_days
from crevnet.data.made.repack import repack
from crevnet.data.made.synthetic import SyntheticCity, write_city

try:
    import hdf5plugin
except ImportError:
    hdf5plugin = None  # type: ignore[assignment]

AS_DISTRIBUTED = "h5py's chunks"
FRAME_PER_CHUNK = "a frame per chunk"


def linked(days: Path, count: int, root: Path) -> dict[str, Path]:
    """The given days, the first `count` of them, in a folder of links."""
    for day in open_days(days)[:count]:
        place(day, root).symlink_to(day.path.resolve())
    return {"as given": root}


def written(city: SyntheticCity, root: Path) -> dict[str, Path]:
    """A folder with the city's training days for each layout, below the root."""
    write_city(city, root / "city")
    folders = {FRAME_PER_CHUNK: root / "city"}
    for day in open_days(root / "city"):
        for layout, options in layouts(day).items():
            folders[layout] = root / layout
            rewrite(day, place(day, folders[layout]), **options)
    if hdf5plugin is not None:
        folders["repacked"] = root / "repacked"
        repack(root / AS_DISTRIBUTED, folders["repacked"])
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
    """The path of a training day below `root`."""
    folder = root / day.city / f"{day.city}_training"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / day.path.name


def rewrite(day: DayFile, path: Path, **options: Any) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("array", data=DayReader().read(day, 0, day.shape[0]), **options)
