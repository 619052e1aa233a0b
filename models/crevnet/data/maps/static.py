"""Static inputs: what a model sees beside a window's frames, and that stays as it is within the window."""

import math
from collections.abc import Mapping, Sequence
from datetime import date as Date
from pathlib import Path

import numpy as np
import torch

from crevnet.data.errors import DataError
from crevnet.data.files.days import DayFile, naming, opened, unit_interval
from crevnet.data.files.layouts import Layout
from crevnet.data.maps.road_map import road_maps
from crevnet.networks.config import STATIC_CHANNELS, Static

Maps = Mapping[Static, Mapping[str, torch.Tensor]]
"""For each static input but the clock, float32 (channels, H, W) in [0, 1] for each city."""

DIRECTIONS = ("N", "NE", "E", "SE", "S", "SW", "W", "NW")
"""Of the neighbours that a pixel's road may lead to, in the order of 2021's static files (`data_layout.py` of the organisers)."""


class StaticInputs:
    """The static channels of a window, in the order of `names`."""

    def __init__(self, names: Sequence[Static], maps: Maps) -> None:
        self.names = tuple(names)
        self._maps = maps

    def only(self, names: Sequence[Static]) -> "StaticInputs":
        """Of these names, all of which are among its own."""
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
    """The road map of each city of `days`, and what else `names` asks for.

    Road maps come from static files where the layout has them, and otherwise from the half-open range `slots` of `days`
    (None: whole days). Raises DataError for names that the layout has no source of, and for static files that cannot be used.
    """
    if "clock" in names and not layout.dated:
        raise DataError("model.static has the clock, and movies have no dates: leave it out")
    files = {day.city: layout.static_file(root, day.city) for day in days}
    sizes = {day.city: day.shape[1:3] for day in days}
    read = {city: read_static(path, sizes[city]) for city, path in files.items() if path is not None}
    if read:
        roads = {city: channels[:1] for city, channels in read.items()}
        return {"road_map": roads, "connectivity": {city: channels[1:] for city, channels in read.items()}}
    if "connectivity" in names:
        raise DataError("model.static has the connectivity, which comes with the data of 2021 alone: leave it out")
    return {"road_map": road_maps(days, slots)}


def read_static(path: Path, size: tuple[int, int]) -> torch.Tensor:
    """A city's static file of 2021, float32 (9, H, W) in [0, 1]: the road map, and the connectivity by `DIRECTIONS`.

    Stored are whole numbers in 0..255; a road that leads on is 255. Raises DataError for a file that cannot be used.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist: it comes with the city's days; leave the city out with --data.cities")
    expected = (1 + STATIC_CHANNELS["connectivity"], *size)
    with naming(str(path)), opened(path) as dataset:
        if dataset.shape != expected or dataset.dtype != np.uint8:
            raise DataError(
                f"{path} is {dataset.dtype} {dataset.shape}, expected uint8 {expected} as its days are; download it again"
            )
        stored = dataset[()]
    if not stored[0].any():  # what is left of a file whose values got lost
        raise DataError(f"{path} has a road map of zeros alone, expected roads; download it again")
    return unit_interval(torch.from_numpy(stored))


def clock(day: DayFile, start: int) -> torch.Tensor:
    """Time of day and day of the week as points of two circles in [0, 1]: float32, sine and cosine of each.

    The slots of a day are taken to share its 24 hours alike. The week's circle turns with the time of day, so that there is no
    jump at midnight.
    """
    of_day = start / day.shape[0]
    of_week = (Date.fromisoformat(day.date).weekday() + of_day) / 7
    angles = [2 * math.pi * part for part in (of_day, of_week)]
    return torch.tensor([(1 + f(angle)) / 2 for angle in angles for f in (math.sin, math.cos)])
