"""The competition of 2021: a hundred hours per city, and six frames to predict in the hour after each.

`<CITY>/<CITY>_test_<task>.h5` contains the hours, (100, 12, 495, 436, 8) uint8. `<CITY>_test_additional_<task>.h5` contains the
weekday (0 is Monday) and the first slot of each, (100, 2), in local time. The answer is a file with the first one's name,
(100, 6, 495, 436, 8) uint8: the frames 5, 10, 15, 30, 45 and 60 minutes later. The score is the mean squared error of values
0..255. The task is temporal or spatiotemporal.
Source: https://github.com/iarai/NeurIPS2021-traffic4cast (data/README.md, competition/).

The truth is a file with the answer's shape, `<CITY>_test_<task>_truth.h5` in the same folder. This layout is the project's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from datetime import date, timedelta
from pathlib import Path

import numpy as np

from crevnet.data.errors import DataError
from crevnet.data.files.days import DayFile, DayReader
from crevnet.data.files.protocol import HeadingOrder, Protocol, protocol
from crevnet.traffic4cast.files import check_channels, holding_out, is_held_out, origin_of, reading_array
from crevnet.traffic4cast.interface import Case, CaseFile, Challenge
from crevnet.traffic4cast.settings import Task

SLOTS = 288
"""Number of slots in a day, which files of hours do not contain."""
_LAST_START = 240  # the organizers' latest, since a slot is stored in one byte
_A_MONDAY = date(2018, 1, 1)


class Challenge2021(Challenge):
    """One of the two tasks of 2021."""

    unit = 1.0

    def __init__(self, task: Task, heading_order: HeadingOrder = "ne-se-sw-nw") -> None:
        self.protocol = protocol("2021", heading_order)
        self._task = task

    def case_files(self, root: Path, cities: Sequence[str] | None) -> list[CaseFile]:
        layout = f"<root>/<CITY>/<CITY>_test_{self._task}.h5"
        found = {
            path.parent.name: path for path in sorted(root.glob("*/*.h5")) if path == self._path(root, path.parent.name)
        }
        if not found:
            raise DataError(
                f"{root} has no test cases of 2021, expected {layout}: check the folder, --data.protocol and --task"
            )
        for city in cities or ():
            if city not in found:
                raise DataError(
                    f"{root} has no test cases of {city}; found {', '.join(found)}; expected {layout}: check --data.cities"
                )
        return [HourCases(found[city], city, self.protocol) for city in dict.fromkeys(cities or found)]

    def hold_out(self, days: Sequence[DayFile], count: int, rng: np.random.Generator, out: Path) -> Iterator[Path]:
        past, window = self.protocol.past, self.protocol.past + self.protocol.horizon
        city, frame = days[0].city, days[0].shape[1:]
        starts = [(day, start) for day in days for start in _apart(day, window, rng)]
        chosen = [starts[index] for index in np.sort(rng.permutation(len(starts))[:count])]
        if not chosen:
            raise DataError(
                f"{days[0].path} has {days[0].shape[0]} slots, but a test case requires {window}: use longer days"
            )
        path = self._path(out, city)
        origin = origin_of(days, [(day.path.name, start) for day, start in chosen])
        there = [is_held_out(target, origin) for target in (path, _additional_of(path), _truth_of(path))]
        if all(there):
            yield path
            return
        reader = DayReader()
        with ExitStack() as files:
            hours = files.enter_context(holding_out(path, (len(chosen), past, *frame), origin))
            additional = files.enter_context(holding_out(_additional_of(path), (len(chosen), 2), origin))
            truth = files.enter_context(
                holding_out(_truth_of(path), (len(chosen), len(self.protocol.horizons), *frame), origin)
            )
            for index, (day, start) in enumerate(chosen):
                frames = reader.read(day, start, start + window)
                hours[index] = frames[:past]
                truth[index] = frames[[past + horizon - 1 for horizon in self.protocol.horizons]]
                additional[index] = date.fromisoformat(day.date).weekday(), start
        yield path

    def _path(self, root: Path, city: str) -> Path:
        return root / city / f"{city}_test_{self._task}.h5"


class HourCases(CaseFile):
    """The hours of one city."""

    def __init__(self, path: Path, city: str, asked: Protocol) -> None:
        self.city = city
        self.name = f"{city}/{path.name}"
        self._path, self._asked = path, asked
        with reading_array(path, f"(cases, {asked.past}, H, W, C), uint8") as hours:
            if hours.ndim != 5 or hours.shape[1] != asked.past or 0 in hours.shape or hours.dtype != np.uint8:
                raise ValueError(f"shape {hours.shape}, dtype {hours.dtype}")
            check_channels(path, hours.shape[4], asked)
            self.shape = (hours.shape[0], len(asked.horizons), *hours.shape[2:])
        with reading_array(
            _additional_of(path), f"weekday and first slot of {path}, ({self.shape[0]}, 2)"
        ) as additional:
            if additional.shape != (self.shape[0], 2) or not np.issubdtype(additional.dtype, np.integer):
                raise ValueError(f"shape {additional.shape}, dtype {additional.dtype}")
            self._when = additional[()]
            highest = (6, SLOTS - asked.past - asked.horizon)
            if (self._when < 0).any() or (self._when > highest).any():
                raise ValueError(f"weekdays and slots up to {self._when.max(0)}, expected 0 to {highest}")

    def case(self, index: int) -> Case:
        weekday, start = (int(value) for value in self._when[index])
        day = (_A_MONDAY + timedelta(weekday)).strftime("%Y%m%d")
        with reading_array(self._path, "an undamaged file: download it again") as hours:
            return Case(
                DayFile(self._path, self.city, day, (SLOTS, *self.shape[2:])), start + self._asked.past, hours[index]
            )

    def truth(self, index: int) -> np.ndarray:
        with reading_array(_truth_of(self._path), f"the truth of {self._path}, {self.shape}, uint8") as truth:
            if truth.shape != self.shape or truth.dtype != np.uint8:
                raise ValueError(f"shape {truth.shape}, dtype {truth.dtype}")
            frames: np.ndarray = truth[index]
            return frames


def _apart(day: DayFile, window: int, rng: np.random.Generator) -> range:
    """First slots of non-overlapping windows of a day, with a random offset."""
    last = min(day.shape[0] - window, _LAST_START)
    return range(int(rng.integers(window)) % (last + 1), last + 1, window) if last >= 0 else range(0)


def _additional_of(path: Path) -> Path:
    return path.with_name(path.name.replace("_test_", "_test_additional_"))


def _truth_of(path: Path) -> Path:
    return path.with_name(f"{path.stem}_truth.h5")
