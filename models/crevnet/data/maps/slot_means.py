"""Historical means: what each pixel holds at a time of day, on average over the training days."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from crevnet.data.errors import DataError
from crevnet.data.files.days import DayFile, DayReader, check_frame_sizes
from crevnet.data.maps.cache import cache_path, read_cached, write_cached

AROUND = 3
"""Slots on either side that a slot's mean is taken over too: a quarter of an hour before and after."""
_AT_ONCE = 24
"""Slots whose sums are held in memory."""


@dataclass(frozen=True)
class SlotMeans:
    """A city's mean frames.

    Attributes:
        first: the first slot that has one.
        means: float16 (slots, H, W, C) in [0, 1], on disk where there is a cache.
    """

    first: int
    means: NDArray[np.float16]

    def frames(self, slot: int, count: int) -> torch.Tensor:
        """Those of `count` slots from `slot` on, float32 (count, C, H, W); slots that have none take the nearest one's."""
        wanted = np.arange(slot, slot + count) - self.first
        means = self.means[wanted.clip(0, len(self.means) - 1)].astype(np.float32)
        return torch.from_numpy(means).permute(0, 3, 1, 2)


def slot_means(days: Sequence[DayFile], slots: tuple[int, int] | None = None) -> dict[str, SlotMeans]:
    """Of each city: each pixel's mean over its days and over the slots up to AROUND from the slot.

    Only the half-open range `slots` (None: whole days) is used, so that nothing is known of what is validated on. All of it is
    read the first time, and kept in the cache folder's `slot_means`, 0.4 GB a city of Traffic4cast 2019; without a cache
    it is held in memory. Raises DataError for slots that a day does not hold, and for damaged days.
    """
    by_city: dict[str, list[DayFile]] = {}
    for day in days:
        by_city.setdefault(day.city, []).append(day)
    return {city: _cached(of_city, slots) for city, of_city in by_city.items()}


def _cached(days: Sequence[DayFile], slots: tuple[int, int] | None) -> SlotMeans:
    check_frame_sizes(days)
    held = [day.slot_range(slots) for day in days]
    known = range(min(h.start for h in held), max(h.stop for h in held))
    shape = (len(known), *days[0].shape[1:])
    path = cache_path("slot_means", days, slots, AROUND)
    found = read_cached(path, shape, np.float16)
    if found is None:
        found = _computed(days, known, shape, path)
    return SlotMeans(known.start, found)


def _computed(days: Sequence[DayFile], known: range, shape: tuple[int, ...], path: Path) -> NDArray[np.float16]:
    try:
        write_cached(path, _means(days, known), shape)
    except OSError:  # nowhere to keep them
        return np.stack(list(_means(days, known)))
    written = read_cached(path, shape, np.float16)
    if written is None:
        raise DataError(
            f"{path} does not hold what was written: check the disk, or set CREVNET_CACHE to another folder"
        )
    return written


def _means(days: Sequence[DayFile], known: range) -> Iterator[NDArray[np.float16]]:
    """Slot by slot, (H, W, C)."""
    reader = DayReader()
    for block in range(known.start, known.stop, _AT_ONCE):
        near = range(max(block - AROUND, known.start), min(block + _AT_ONCE + AROUND, known.stop))
        sums = np.zeros((len(near), *days[0].shape[1:]), dtype=np.float32)  # of integers, and so exact
        counts = np.zeros(len(near))
        for day in days:
            end = min(near.stop, day.shape[0])
            if end > near.start:
                sums[: end - near.start] += reader.read(day, near.start, end)
                counts[: end - near.start] += 1
        for slot in near[block - near.start :][:_AT_ONCE]:
            around = slice(max(slot - AROUND - near.start, 0), slot + AROUND + 1 - near.start)
            yield (sums[around].sum(0) / (255 * counts[around].sum())).astype(np.float16)
