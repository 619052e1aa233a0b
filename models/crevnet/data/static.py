"""Static inputs: what a model sees beside a window's frames, and that stays as it is within the window."""

import math
from collections.abc import Mapping, Sequence
from datetime import date as Date

import torch

from crevnet.config import Static
from crevnet.data.traffic4cast import DayFile


class StaticInputs:
    """The static channels of a window, in the order of `names`.

    Args:
        names: which, and in which order.
        maps: for each name but the clock, float32 (channels, H, W) in [0, 1] for each city.
    """

    def __init__(self, names: Sequence[Static], maps: Mapping[Static, Mapping[str, torch.Tensor]]) -> None:
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


def clock(day: DayFile, start: int) -> torch.Tensor:
    """Time of day and day of the week as points of two circles in [0, 1]: float32, sine and cosine of each.

    The slots of a day are taken to share its 24 hours alike. The week's circle turns with the time of day, so that there is no
    jump at midnight.
    """
    of_day = start / day.shape[0]
    of_week = (Date(int(day.date[:4]), int(day.date[4:6]), int(day.date[6:])).weekday() + of_day) / 7
    angles = [2 * math.pi * part for part in (of_day, of_week)]
    return torch.tensor([(1 + f(angle)) / 2 for angle in angles for f in (math.sin, math.cos)])
