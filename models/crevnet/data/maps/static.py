"""Static inputs: channels that a model receives in addition to the frames, and that are constant within a window."""

import math
from collections.abc import Mapping, Sequence
from datetime import date as Date
from pathlib import Path

import numpy as np
import torch

from crevnet.data.errors import DataError
from crevnet.data.files.datasets import naming, opened
from crevnet.data.files.days import DayFile, unit_interval
from crevnet.data.files.layouts import Layout
from crevnet.data.maps.road_map import road_maps
from crevnet.networks.config import STATIC_CHANNELS, Static

Maps = Mapping[Static, Mapping[str, torch.Tensor]]
"""Static input (except the clock) -> city -> float32 (channels, H, W) in [0, 1]."""

DIRECTIONS = ("N", "NE", "E", "SE", "S", "SW", "W", "NW")
"""Directions of a pixel's eight neighbors, in the order of 2021's static files (`data_layout.py` of the organizers)."""


class StaticInputs:
    """The static channels of a window, in the order of `names`."""

    def __init__(self, names: Sequence[Static], maps: Maps) -> None:
        self.names = tuple(names)
        self._maps = maps

    def only(self, names: Sequence[Static]) -> "StaticInputs":
        """The same inputs with only these names, a subset of `self.names`."""
        return StaticInputs(names, self._maps)

    def __call__(self, day: DayFile, start: int) -> torch.Tensor:
        """float32 (S, H, W) for the window that begins at slot `start` of a day; S may be 0."""
        height, width = day.shape[1:3]
        parts = [
            clock(day, start)[:, None, None].expand(-1, height, width)
            if name == "clock"
            else self._maps[name][day.city]
            for name in self.names
        ]
        return torch.cat(parts) if parts else torch.empty(0, height, width)


def static_maps(
    names: Sequence[Static], layout: Layout, root: Path, days: Sequence[DayFile], slots: tuple[int, int] | None = None
) -> Maps:
    """The road map of each city of `days`, and the other maps in `names`.

    Road maps are read from static files if the layout has them. Otherwise they are computed from the half-open range `slots` of
    `days` (None: whole days). Raises DataError for names that the layout cannot provide, and for unusable static files.
    """
    if "clock" in names and not layout.dated:
        raise DataError("model.static includes clock, but videos have no dates: remove clock from it")
    files = {day.city: layout.static_file(root, day.city) for day in days}
    sizes = {day.city: day.shape[1:3] for day in days}
    read = {city: read_static(path, sizes[city]) for city, path in files.items() if path is not None}
    if read:
        roads = {city: channels[:1] for city, channels in read.items()}
        return {"road_map": roads, "connectivity": {city: channels[1:] for city, channels in read.items()}}
    if "connectivity" in names:
        raise DataError("model.static includes connectivity, which only the data of 2021 have: remove it from the list")
    return {"road_map": road_maps(days, slots)}


def read_static(path: Path, size: tuple[int, int]) -> torch.Tensor:
    """A city's static file of 2021, float32 (9, H, W) in [0, 1]: the road map, then the connectivity by `DIRECTIONS`.

    The file has integers in 0..255; 255 means that a road leads to that neighbor. Raises DataError for an unusable file.
    """
    if not path.exists():
        raise DataError(
            f"{path} does not exist, expected the static file of the city: download it, or leave the city out of --data.cities"
        )
    expected = (1 + STATIC_CHANNELS["connectivity"], *size)
    with naming(str(path)), opened(path) as dataset:
        if dataset.shape != expected or dataset.dtype != np.uint8:
            raise DataError(
                f"{path} is {dataset.dtype} {dataset.shape}, expected uint8 {expected} to match its days; download it again"
            )
        stored = dataset[()]
    if not stored[0].any():  # the result of a file whose chunks were lost
        raise DataError(f"{path} has a road map of only zeros, expected roads; download it again")
    return unit_interval(torch.from_numpy(stored))


def clock(day: DayFile, start: int) -> torch.Tensor:
    """Time of day and day of the week as points on two circles: float32 (4,) in [0, 1], sine and cosine of each.

    The slots of a day are assumed to divide its 24 hours evenly. The week's circle advances with the time of day, so there is
    no jump at midnight.
    """
    of_day = start / day.shape[0]
    of_week = (Date.fromisoformat(day.date).weekday() + of_day) / 7
    angles = [2 * math.pi * part for part in (of_day, of_week)]
    return torch.tensor([(1 + f(angle)) / 2 for angle in angles for f in (math.sin, math.cos)])
