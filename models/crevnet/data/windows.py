"""Windows of consecutive frames, on which a model is trained and scored."""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch.utils.data import Dataset

from crevnet.data.errors import DataError
from crevnet.data.files.days import DayFile, DayReader, check_frame_sizes, unit_interval


class Windows(Dataset[dict[str, Any]]):
    """Windows of consecutive slots of days or videos, read from disk on access.

    Args:
        days: day files with the same H, W and C, from `open_days`.
        frames: number of slots in a window.
        slots: half-open range of slots that must contain each window completely; None is the whole day. It is cut at the end
            of a video, and videos without a window in it are skipped.
        stride: slots from the start of one window to the start of the next.
        starts: the first slot of each window of a day, instead of one every `stride` slots.
        road_maps: city -> float32 (1, H, W). If given, each item also has its city's map.
        static: returns the static channels (S, H, W) for a day and the first slot of a window. If given, each item also has
            them.

    An item is {"frames": float32 (frames, C, H, W) in [0, 1], "city": str, "date": str, "start": first slot}. With road maps it
    also has "road_map": float32 (1, H, W), and with static channels "static": float32 (S, H, W).

    Raises ValueError for unusable frames, stride or road maps, and DataError for days, slots or starts that do not match.
    Reading a damaged window raises DataError.
    """

    def __init__(
        self,
        days: Sequence[DayFile],
        frames: int,
        slots: tuple[int, int] | None = None,
        stride: int = 1,
        starts: Sequence[int] | None = None,
        road_maps: Mapping[str, torch.Tensor] | None = None,
        static: Callable[[DayFile, int], torch.Tensor] | None = None,
    ) -> None:
        if frames < 1:
            raise ValueError(f"frames is {frames}; expected at least 1")
        if stride < 1:
            raise ValueError(f"stride is {stride}; expected at least 1")
        if starts is not None and stride != 1:
            raise ValueError(f"starts and stride={stride} exclude each other; omit one of them")
        check_frame_sizes(days)
        if road_maps is not None:
            _check_road_maps(road_maps, days)
        self.days = tuple(days)
        self.frames = frames
        self._road_maps, self._static = road_maps, static
        self._starts = [_window_starts(day, frames, slots, stride, starts) for day in self.days]
        self._ends = list(accumulate(map(len, self._starts)))
        self._reader = DayReader()
        if not len(self):
            raise DataError(f"no window of frames={frames} in {len(days)} files; use fewer frames or longer files")

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        number = bisect_right(self._ends, index)
        day, starts = self.days[number], self._starts[number]
        start = starts[index - self._ends[number]]  # counts back from the day's end, hence the negative index
        window = torch.from_numpy(self._reader.read(day, start, start + self.frames))
        stored_TCHW = window.permute(0, 3, 1, 2).contiguous()  # before the conversion, for fewer bytes to copy
        item: dict[str, Any] = {
            "frames": unit_interval(stored_TCHW),
            "city": day.city,
            "date": day.date,
            "start": start,
        }
        if self._road_maps is not None:
            item["road_map"] = self._road_maps[day.city]
        if self._static is not None:
            item["static"] = self._static(day, start)
        return item


def _window_starts(
    day: DayFile, frames: int, slots: tuple[int, int] | None, stride: int, starts: Sequence[int] | None
) -> Sequence[int]:
    held = day.slot_range(slots)
    if starts is not None:
        for start in starts:
            if not held.start <= start <= held.stop - frames:
                raise DataError(
                    f"starts has slot {start}, from which {frames} frames extend beyond slots "
                    f"({held.start}, {held.stop}) of {day.path}; choose starts within them"
                )
        return tuple(int(start) for start in starts)
    if slots is not None and day.layout.dated and len(held) < frames:
        raise DataError(f"slots=({held.start}, {held.stop}) has no window of frames={frames}; widen it or lower frames")
    return range(held.start, held.stop - frames + 1, stride)


def _check_road_maps(road_maps: Mapping[str, torch.Tensor], days: Sequence[DayFile]) -> None:
    for day in days:
        expected = (1, *day.shape[1:3])
        if day.city not in road_maps:
            raise ValueError(
                f"road_maps has no map of {day.city}, only of {', '.join(road_maps)}; expected every city of days"
            )
        if road_maps[day.city].shape != expected:
            raise ValueError(f"road_maps[{day.city!r}] is {tuple(road_maps[day.city].shape)}, expected {expected}")
