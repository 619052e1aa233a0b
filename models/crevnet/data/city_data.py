"""The data of a run: its days, the static inputs of its cities, and batches of windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import ConcatDataset, Dataset, Sampler

from crevnet.data.errors import DataError
from crevnet.data.files.dates import DateChoice
from crevnet.data.files.days import DayFile, check_frame_sizes, open_days
from crevnet.data.files.layouts import layout_named
from crevnet.data.files.protocol import TEST_SLOTS
from crevnet.data.flips import FLIPS, FlippedWindows
from crevnet.data.identity import Identity, identity
from crevnet.data.maps.static import StaticInputs, static_maps
from crevnet.data.sampling import EpochShuffle, WindowLoader, window_loader
from crevnet.data.settings import DataSettings
from crevnet.data.windows import Windows
from crevnet.networks.config import ModelConfig


class CityData:
    """The days, road maps and windows of a run's cities.

    Attributes:
        layout: the meaning of the files' names, channels and slots.
        training_days, validation_days: the files of each split.
        road_maps: float32 (1, H, W) in [0, 1] for each city.
        static: the static channels of a window.
    """

    def __init__(self, settings: DataSettings, model: ModelConfig, seed: int = 0) -> None:
        self._settings = settings
        self._model = model
        self._seed = seed
        self.layout = layout_named(settings.protocol, settings.heading_order)
        self.training_days = open_training_days(settings)
        first = self.training_days[0]
        if first.shape[3] != model.channels:
            remedy = self.layout.channels_remedy(first.shape)
            raise DataError(f"{first.path} has {first.shape[3]} channels, but the model has {model.channels}: {remedy}")
        _check_slots("data.training_slots", settings.training_slots, self.training_days, model.window)
        maps = static_maps(model.static, self.layout, settings.root, self.training_days, settings.training_slots)
        self.road_maps = maps["road_map"]
        self.static = StaticInputs(model.static, maps)
        self.validation_days = open_validation_days(settings)
        _check_slots("data.validation_slots", settings.validation_slots, self.validation_days, model.window)
        check_frame_sizes([*self.training_days, *self.validation_days])
        for day in self.validation_days:
            if day.city not in self.road_maps:
                raise DataError(
                    f"{day.city} has validation days but no training day, which its road map requires: add training days, "
                    "or leave the city out of --data.cities"
                )

    @property
    def identity(self) -> Identity:
        """The names, sizes and dates of the files, static files included."""
        root, days = Path(self._settings.root or ""), [*self.training_days, *self.validation_days]
        static = {self.layout.static_file(root, day.city) for day in days}
        return identity(root, {day.path for day in days} | {path for path in static if path is not None})

    def training_batches(self) -> WindowLoader:
        """The training windows in random order. DataError if they would also be the validation windows."""
        slots = self._settings.training_slots
        both = {day.path for day in self.training_days} & {day.path for day in self.validation_days}
        if both and slots is None and self._settings.validation_slots is None:
            splits = self._settings.training_split, self._settings.validation_split
            remedy = self.layout.parting_remedy(Path(self._settings.root or ""), splits)
            raise DataError(f"{min(both)} is in both the training and the validation data: {remedy}")
        windows = self._windows(self.training_days, slots=slots, stride=self._settings.stride)
        flips = FLIPS[self._settings.flips]
        flipped = FlippedWindows(windows, flips, self.layout, self._model.static)
        return self._loader(flipped, EpochShuffle(len(windows), self._seed, len(flips)))

    def validation_batches(self, city: str | None = None) -> WindowLoader:
        """The validation windows of one city, or of all (None), in order."""
        days = [day for day in self.validation_days if city in (None, day.city)]
        if self._settings.validation_windows == "test":
            of_cities = dict.fromkeys(day.city for day in days)
            return self._loader(ConcatDataset([self._test_windows(days, name) for name in of_cities]))
        stride = self._settings.validation_stride or self._model.window
        return self._loader(self._windows(days, slots=self._settings.validation_slots, stride=stride))

    def window(self, day: DayFile, start: int) -> dict[str, Any]:
        """The window of `day` that begins at slot `start`, as an item of Windows."""
        return self._windows([day], starts=[start])[0]

    def static_of(self, model: ModelConfig, window: Mapping[str, Any]) -> torch.Tensor | None:
        """Static inputs (B, S, H, W) of `model` for a batch of validation windows; None if it has no static inputs.

        The window of `model` may be shorter: it is the last frames of each validation window.
        """
        if not model.static:
            return None
        inputs = self.static.only(model.static)
        days = {(day.city, day.date): day for day in self.validation_days}
        later = self._model.window - model.window
        named = zip(window["city"], window["date"], window["start"], strict=True)
        return torch.stack([inputs(days[city, date], int(start) + later) for city, date, start in named])

    def _test_windows(self, days: Sequence[DayFile], city: str) -> Windows:
        """The windows before the slots of a city that the 2019 competition scores."""
        if city not in TEST_SLOTS:
            raise DataError(
                f"the competition of 2019 has no test slots of {city}, only of {', '.join(TEST_SLOTS)}: "
                "set --data.validation_windows strided"
            )
        of_city = [day for day in days if day.city == city]
        starts = [slot - self._model.past for slot in TEST_SLOTS[city]]
        slots, end = self._settings.validation_slots, max(starts) + self._model.window
        if slots is not None and not (slots[0] <= min(starts) and end <= slots[1]):
            raise DataError(
                f"data.validation_slots {_written(slots)} excludes some test windows of {city} in the competition of 2019, "
                f"which extend over [{min(starts)},{end}]: widen it, or set --data.validation_windows strided"
            )
        return self._windows(of_city, slots=slots, starts=starts)

    def _windows(self, days: Sequence[DayFile], **places: Any) -> Windows:
        lengths = {day.path: day.shape[0] for day in days}
        error = self.layout.length_error(lengths, self._model.past, self._model.horizon)
        if error is not None:
            raise error
        return Windows(days, self._model.window, road_maps=self.road_maps, static=self.static, **places)

    def _loader(self, windows: Dataset[dict[str, Any]], sampler: Sampler[int] | None = None) -> WindowLoader:
        return window_loader(windows, self._settings.batch_size, self._settings.workers, sampler)


def _check_slots(option: str, slots: tuple[int, int] | None, days: Sequence[DayFile], window: int) -> None:
    """Raise DataError naming the option if its half-open range `slots` is outside the days or too short for a window.

    Every day must contain the range. Videos differ in length; at least one must contain a window within the range.
    """
    if slots is None:
        return
    written = f"{option} {_written(slots)}"
    shortest, longest = (choose(days, key=lambda day: day.shape[0]) for choose in (min, max))
    if not 0 <= slots[0] < slots[1]:
        raise DataError(
            f"{written} is not a range: write [first,past-the-last], within [0,{longest.shape[0]}] for {longest.path}"
        )
    if shortest.layout.dated and slots[1] > shortest.shape[0]:
        raise DataError(
            f"{written} extends beyond {shortest.path}, which has {shortest.shape[0]} slots: choose a range within "
            f"[0,{shortest.shape[0]}]"
        )
    left = len(longest.slot_range(slots))
    if left < window:
        more = "" if longest.layout.dated else ", the longest video"
        raise DataError(
            f"{written} leaves {left} of the {longest.shape[0]} frames of {longest.path}{more}; expected at least {window}, "
            "--model.past plus --model.horizon: choose another range, or lower these"
        )


def _written(slots: tuple[int, int]) -> str:
    """A range, as written in the options."""
    return f"[{slots[0]},{slots[1]}]"


def open_training_days(settings: DataSettings) -> list[DayFile]:
    """The days to train on, checked; DataError without any."""
    return _open(settings, settings.training_split, _dates(settings)[0])


def open_validation_days(settings: DataSettings) -> list[DayFile]:
    """The days to validate on, checked; DataError without any."""
    return _open(settings, settings.validation_split, _dates(settings)[1])


def _open(settings: DataSettings, split: str, dates: DateChoice) -> list[DayFile]:
    layout = layout_named(settings.protocol, settings.heading_order)
    if settings.root is None:
        raise DataError(f"data.root is not set: add --data.root FOLDER, or {layout.made_by}")
    return open_days(settings.root, split, settings.cities, settings.skip_damaged, layout, dates)


def _dates(settings: DataSettings) -> tuple[DateChoice, DateChoice]:
    """The dates to train and to validate on. If both splits are one folder, a missing list means the dates not in the other."""
    lists = settings.training_dates, settings.validation_dates
    taken = lists if settings.training_split == settings.validation_split else (None, None)
    return (
        DateChoice("data.training_dates", lists[0], taken[1]),
        DateChoice("data.validation_dates", lists[1], taken[0]),
    )
