"""The competition of 2019: five blocks per test day, and three frames to predict after each.

`<City>/<City>_test/YYYYMMDD_100m_bins.h5` contains a day (288, 495, 436, 3), zero except for the 12 frames before each of five
slots. The answer is a file with the same name, (5, 3, 495, 436, 3) uint8. The score is the mean squared error of values / 255.
Source: the organizers' readme and baselines, https://github.com/iarai/NeurIPS2019-traffic4cast.

The truth is the full day, in `<City>/<City>_test_truth/`, with the same name. This layout is the project's own.
"""

from __future__ import annotations

import filecmp
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from crevnet.data.errors import DataError
from crevnet.data.files.days import DayFile, DayReader, open_day, open_days
from crevnet.data.files.protocol import TEST_SLOTS, Protocol, protocol
from crevnet.machine.files import replacing
from crevnet.traffic4cast.files import check_channels, exists_already, holding_out, is_held_out, origin_of
from crevnet.traffic4cast.interface import Case, CaseFile, Challenge


class Challenge2019(Challenge):
    """The task of 2019.

    Args:
        slots: first predicted slots, for cities other than the competition's three, which have their own.
    """

    unit = 1 / 255**2

    def __init__(self, slots: Sequence[int] | None = None) -> None:
        self.protocol = protocol("2019")
        self._slots = slots

    def case_files(self, root: Path, cities: Sequence[str] | None) -> list[CaseFile]:
        reader = DayReader()
        return [DayCases(day, self._slots_of(day), self.protocol, reader) for day in open_days(root, "test", cities)]

    def hold_out(self, days: Sequence[DayFile], count: int, rng: np.random.Generator, out: Path) -> Iterator[Path]:
        reader = DayReader()
        drawn = [days[index] for index in np.sort(rng.permutation(len(days))[:count])]
        origin = origin_of(drawn, [self._slots_of(day) for day in drawn])
        paths = {out / day.city / f"{day.city}_test" / f"{day.date}_100m_bins.h5": day for day in drawn}
        held_out = {path: _is_held_out(path, day, origin) for path, day in paths.items()}  # before any is written
        for path, day in paths.items():
            if not held_out[path]:
                with replacing(_truth_of(path)) as partial:
                    shutil.copyfile(day.path, partial)
                with holding_out(path, day.shape, origin) as frames:
                    for first in self._slots_of(day):
                        frames[first - self.protocol.past : first] = reader.read(day, first - self.protocol.past, first)
            yield path

    def _slots_of(self, day: DayFile) -> tuple[int, ...]:
        slots = TEST_SLOTS.get(day.city, self._slots)
        if slots is None:
            raise DataError(
                f"{day.path}: {day.city} was not in the competition: give the first predicted slots by --slots '[57,114,...]'"
            )
        lowest, highest = self.protocol.past, day.shape[0] - self.protocol.horizon
        if not slots or not all(lowest <= first <= highest for first in slots):
            raise DataError(
                f"--slots {list(slots)} does not fit {day.path}, which has {day.shape[0]} slots: choose slots from {lowest} "
                f"to {highest}"
            )
        return tuple(slots)


class DayCases(CaseFile):
    """The blocks of one test day."""

    def __init__(self, day: DayFile, slots: Sequence[int], asked: Protocol, reader: DayReader) -> None:
        check_channels(day.path, day.shape[3], asked)
        self.city = day.city
        self.name = f"{day.city}/{day.city}_test/{day.path.name}"
        self.shape = (len(slots), len(asked.horizons), *day.shape[1:])
        self._day, self._slots, self._asked, self._reader = day, slots, asked, reader

    def case(self, index: int) -> Case:
        first = self._slots[index]
        past = self._reader.read(self._day, first - self._asked.past, first).astype(np.uint8)
        if not past.any():
            warnings.warn(
                f"{self._day.path}: the {len(past)} frames before slot {first} are all zero; check --slots for this day",
                stacklevel=2,
            )
        return Case(self._day, first, past)

    def truth(self, index: int) -> np.ndarray:
        path = _truth_of(self._day.path)
        if not path.is_file():
            raise DataError(
                f"{path} is missing, expected the full day of {self._day.path}, which the score requires: add the file"
            )
        day, first = open_day(path), self._slots[index]
        if day.shape != self._day.shape:
            raise DataError(
                f"{path} has shape {day.shape}, but its test day has {self._day.shape}: replace it with the full day"
            )
        frames = self._reader.read(day, first, first + self._asked.horizon).astype(np.uint8)
        return frames[[horizon - 1 for horizon in self._asked.horizons]]


def _is_held_out(path: Path, day: DayFile, origin: str) -> bool:
    """Whether a test case and its truth exist. DataError if another file is at one of their paths."""
    truth = _truth_of(path)
    if truth.exists() and not filecmp.cmp(truth, day.path, shallow=False):
        raise exists_already(truth)
    return is_held_out(path, origin) and truth.exists()


def _truth_of(path: Path) -> Path:
    return path.parent.with_name(f"{path.parent.name}_truth") / path.name
