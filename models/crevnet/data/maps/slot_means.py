"""Historical means: the mean of each pixel at each time of day, over the training days."""

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
"""Slots before and after a slot that its mean includes: a quarter of an hour on each side."""
_AT_ONCE = 24
"""Number of slots whose sums are in memory at the same time."""


@dataclass(frozen=True)
class SlotMeans:
    """A city's mean frames.

    Attributes:
        first: the first slot that has a mean.
        means: float16 (slots, H, W, C) in [0, 1]; memory-mapped if there is a cache.
    """

    first: int
    means: NDArray[np.float16]

    def frames(self, slot: int, count: int) -> torch.Tensor:
        """Means of `count` slots from `slot`, float32 (count, C, H, W); a slot without a mean gets the nearest one."""
        wanted = np.arange(slot, slot + count) - self.first
        means = self.means[wanted.clip(0, len(self.means) - 1)].astype(np.float32)
        return torch.from_numpy(means).permute(0, 3, 1, 2)


def slot_means(days: Sequence[DayFile], slots: tuple[int, int] | None = None) -> dict[str, SlotMeans]:
    """City -> each pixel's mean over the city's days and over the slots up to AROUND before and after.

    Only the half-open range `slots` (None: whole days) is used, so validation slots do not leak into the means. The first call
    reads all of it and stores the means in `slot_means` of the cache folder: 0.4 GB for each city of Traffic4cast 2019. Without
    a cache they are held in memory. Raises DataError for slots that a day does not contain, and for damaged days.
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
    except OSError:  # the cache cannot be written
        return np.stack(list(_means(days, known)))
    written = read_cached(path, shape, np.float16)
    if written is None:
        raise DataError(
            f"{path} does not contain the values written: check the disk, or set CREVNET_CACHE to another folder"
        )
    return written


def _means(days: Sequence[DayFile], known: range) -> Iterator[NDArray[np.float16]]:
    """The mean of each slot, float16 (H, W, C)."""
    reader = DayReader()
    for block in range(known.start, known.stop, _AT_ONCE):
        near = range(max(block - AROUND, known.start), min(block + _AT_ONCE + AROUND, known.stop))
        sums = np.zeros((len(near), *days[0].shape[1:]), dtype=np.float32)  # exact, since the values are integers
        counts = np.zeros(len(near))
        for day in days:
            end = min(near.stop, day.shape[0])
            if end > near.start:
                sums[: end - near.start] += reader.read(day, near.start, end)
                counts[: end - near.start] += 1
        for slot in near[block - near.start :][:_AT_ONCE]:
            around = slice(max(slot - AROUND - near.start, 0), slot + AROUND + 1 - near.start)
            yield (sums[around].sum(0) / (255 * counts[around].sum())).astype(np.float16)
