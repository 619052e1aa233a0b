"""Which window of the validation days is shown, where only one is."""

from __future__ import annotations

from collections.abc import Sequence

from crevnet.data.errors import DataError
from crevnet.data.files.days import DayFile
from crevnet.networks.config import ModelConfig

MORNING = 96
"""The slot of 08:00."""


def choose_window(
    days: Sequence[DayFile],
    slots: tuple[int, int] | None,
    model: ModelConfig,
    city: str | None = None,
    date: str | None = None,
    slot: int | None = None,
) -> tuple[DayFile, int]:
    """A day and the first slot to predict in it. DataError where there is no such window.

    slots: the half-open range in which it has to lie.
    city, date: the first day, of those that are long enough, if not given.
    slot: 08:00 if not given, where a window is there, else the middle.
    """
    dates = [day.date for day in days] if date is None else [date, date.replace("-", "")]
    found = [day for day in days if city in (None, day.city) and day.date in dates]
    if not found:
        layout = days[0].layout
        asked = " ".join(f"--{name} {value}" for name, value in (("city", city), ("date", date)) if value is not None)
        there = ", ".join(layout.named(day.city, day.date) for day in days[:10])
        if city is not None and not layout.dated:
            raise DataError(f"--city {city} is given, but movies have no cities: name one by --date, there are {there}")
        raise DataError(f"no validation {layout.noun} for {asked}; there are {there}")
    day = next((day for day in found if len(day.slot_range(slots)) >= model.window), found[0])
    held = day.slot_range(slots)
    first, last = held.start + model.past, held.stop - model.horizon
    if first > last:
        within = "" if slots is None else f" of data.validation_slots [{slots[0]},{slots[1]}]"
        raise DataError(
            f"{day.path}: {len(held)} slots{within} are too few for a window of {model.window} frames: choose another "
            f"{day.layout.noun} by --date"
        )
    if slot is None:
        slot = MORNING if first <= MORNING <= last else (first + last) // 2
    if not first <= slot <= last:
        raise DataError(
            f"--slot {slot}: with {model.past} frames before and {model.horizon} to predict, choose {first} to {last}"
        )
    return day, slot


def default_channel(model: ModelConfig) -> int:
    """Of those, the one that is shown: Traffic4cast's speed."""
    return min(1, model.channels - 1)
