"""Reader of Traffic4cast 2019: one HDF5 file a day and city, read window by window.

Layout: `<root>/<City>/<City>_{training,validation,test}/YYYYMMDD_100m_bins.h5`. The first dataset of a file (usually
`array`) is (slots, H, W, C), uint8 or int16 in 0..255; in the competition (288, 495, 436, 3): five-minute slots in UTC,
pixels of 100 m, channels volume, mean speed and majority heading (1 NW, 85 NE, 170 SW, 255 SE), 0 where no data.
Days may be missing, and any slots, H, W and C are read, as long as the files used together agree on H, W and C.
"""

import os
import re
import warnings
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch.utils.data import Dataset

_ISTANBUL_TEST_SLOTS = (57, 114, 174, 222, 258)
#: First predicted slots of a test day in the competition of 2019; the 12 slots before each are given.
TEST_SLOTS = {"Berlin": (30, 69, 126, 186, 234), "Istanbul": _ISTANBUL_TEST_SLOTS, "Moscow": _ISTANBUL_TEST_SLOTS}

_DAY_NAME = re.compile(r"(\d{8})_100m_bins\.h5")
_DTYPES = (np.dtype(np.uint8), np.dtype(np.int16))
_MAX_OPEN_FILES = 32


class DataError(Exception):
    """A file or folder that cannot be used; one line that names it, what it was, what was expected and what to do."""


@dataclass(frozen=True)
class DayFile:
    """One day of one city. `date` is YYYYMMDD, `shape` is (slots, H, W, C)."""

    path: Path
    city: str
    date: str
    shape: tuple[int, int, int, int]

    def slot_range(self, slots: tuple[int, int] | None) -> range:
        """The slots of the half-open range `slots` (None: the whole day); DataError if the day does not hold them."""
        first, end = (0, self.shape[0]) if slots is None else slots
        if not 0 <= first < end <= self.shape[0]:
            raise DataError(
                f"slots=({first}, {end}) is not a range within {self.path}, which holds {self.shape[0]} slots"
            )
        return range(first, end)


def open_days(
    root: str | os.PathLike[str],
    split: str = "training",
    cities: Sequence[str] | None = None,
    skip_damaged: bool = False,
) -> list[DayFile]:
    """Find and check the day files of a split, by city and date.

    `cities` None takes every city with day files in that split. Each file's first and last frame are read, so damage
    there shows now; damage between them shows when a window is read. Raises DataError naming the first file that cannot
    be used, or, with `skip_damaged`, warns (UserWarning) and leaves it out.
    """
    root = Path(root)
    found = _find_days(root, split)
    layout = f"<root>/<City>/<City>_{split}/YYYYMMDD_100m_bins.h5"
    if not found:
        raise DataError(f"{root} holds no day file of split {split!r}; expected {layout}: check the root and the split")
    for city in cities or ():
        if city not in found:
            raise DataError(f"{root} holds no day file of {city}; found {', '.join(found)}; expected {layout}")

    def reject(error: DataError) -> None:
        if not skip_damaged:
            raise error
        warnings.warn(f"left out: {error}", stacklevel=3)

    days = []
    for city in found if cities is None else dict.fromkeys(cities):
        for path in found[city]:
            try:
                days.append(open_day(path, city))
            except DataError as error:
                reject(error)
    # The commonest frame size is the expected one, so a single odd file is named whichever comes first.
    sizes = Counter(day.shape[1:] for day in days)
    expected = max(sizes, key=sizes.__getitem__, default=None)
    for day in days:
        if day.shape[1:] != expected:
            reject(
                DataError(f"{day.path} has frames {day.shape[1:]}, the other files {expected} (H, W, C); leave it out")
            )
    days = [day for day in days if day.shape[1:] == expected]
    if not days:
        raise DataError(f"{root} holds no undamaged day file of split {split!r}; download the files again")
    return days


class DayReader:
    """Reads slots of day files, keeping the most recently used few open, each process with handles of its own."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, h5py.Dataset] = OrderedDict()
        self._process = os.getpid()

    def __reduce__(self) -> tuple[type["DayReader"], tuple[()]]:
        return DayReader, ()

    def read(self, day: DayFile, start: int, stop: int) -> np.ndarray:
        """Slots start..stop-1 of a day, (stop - start, H, W, C), as stored; DataError naming file and slots if damaged."""
        with _naming(f"{day.path}, slots {start} to {stop - 1},"):
            return _read_slots(self._dataset(day.path), start, stop)

    def _dataset(self, path: Path) -> h5py.Dataset:
        if self._process != os.getpid():
            # HDF5 would hand a forked worker the parent's handle, with its file offset, unless it is closed here first.
            while self._open:
                self._close_oldest()
            self._process = os.getpid()
        if path not in self._open:
            if len(self._open) >= _MAX_OPEN_FILES:
                self._close_oldest()
            self._open[path] = _first_dataset(h5py.File(path, "r"))
        self._open.move_to_end(path)
        return self._open[path]

    def _close_oldest(self) -> None:
        _, dataset = self._open.popitem(last=False)
        dataset.file.close()


def sample_frames(days: Sequence[DayFile], slots: tuple[int, int] | None, frames: int) -> Iterator[np.ndarray]:
    """At most `frames` frames (H, W, C), as stored, spread evenly over the half-open range `slots` (None: the whole day)."""
    held = [(day, slot) for day in days for slot in day.slot_range(slots)]
    chosen = [held[i * len(held) // frames] for i in range(frames)] if frames < len(held) else held
    reader = DayReader()
    for day, slot in chosen:
        yield reader.read(day, slot, slot + 1)[0]


class Traffic4cast(Dataset[dict[str, Any]]):
    """Windows of consecutive slots, read from disk when asked for.

    Args:
        days: day files with the same H, W and C, from `open_days`.
        frames: number of slots in a window.
        slots: half-open range of slots in which the windows must lie wholly; None is the whole day.
        stride: slots from the start of one window to the start of the next.
        starts: the first slot of each window of a day, instead of one every `stride` slots.
        road_maps: float32 (1, H, W) for each city; given, each item also holds the one of its city.
        static: gives the static channels (S, H, W) of a day's window by its first slot; given, each item also holds them.

    An item is {"frames": float32 (frames, C, H, W) in [0, 1], "city": str, "date": "YYYYMMDD", "start": first slot}, with
    road maps "road_map": float32 (1, H, W), and with static channels "static": float32 (S, H, W). Raises ValueError for frames,
    stride or road maps that cannot be used and DataError for days, slots or starts that do not fit each other; reading a
    damaged window raises DataError.
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
            raise ValueError(f"starts and stride={stride} exclude each other; leave one of them out")
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
            raise DataError(f"no window of frames={frames} in {len(days)} day files; use fewer frames or longer days")

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        number = bisect_right(self._ends, index)
        day, starts = self.days[number], self._starts[number]
        start = starts[index - self._ends[number]]  # counts back from the day's end, hence the negative index
        window = torch.from_numpy(self._reader.read(day, start, start + self.frames))
        stored_TCHW = window.permute(0, 3, 1, 2).contiguous()  # before it has four times as many bytes to move
        frames = stored_TCHW.to(torch.float32).div_(255)
        item: dict[str, Any] = {"frames": frames, "city": day.city, "date": day.date, "start": start}
        if self._road_maps is not None:
            item["road_map"] = self._road_maps[day.city]
        if self._static is not None:
            item["static"] = self._static(day, start)
        return item


def _find_days(root: Path, split: str) -> dict[str, list[Path]]:
    """City -> paths of its day files in the split, sorted; cities without any are left out."""
    found = {}
    try:
        for folder in sorted(root.iterdir()):
            split_folder = folder / f"{folder.name}_{split}"
            if split_folder.is_dir():
                paths = sorted(path for path in split_folder.iterdir() if _DAY_NAME.fullmatch(path.name))
                if paths:
                    found[folder.name] = paths
    except OSError as error:
        raise DataError(
            f"{root} cannot be listed ({_one_line(error)}); expected a folder <root>/<City>/<City>_{split}: check the path"
        ) from error
    return found


def open_day(path: Path, city: str | None = None) -> DayFile:
    """Check one day file; `city` is by default the name of the folder that holds the split's. DataError if it is damaged."""
    with _naming(str(path)):
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty (0 bytes), expected an HDF5 file; download it again or leave it out")
        with h5py.File(path, "r") as file:
            dataset = _first_dataset(file)
            if dataset.ndim != 4 or 0 in dataset.shape:
                raise DataError(f"{path} has shape {dataset.shape}, expected (slots, H, W, C), none 0; leave it out")
            if dataset.dtype not in _DTYPES:
                raise DataError(f"{path} has dtype {dataset.dtype}, expected uint8 or int16; leave it out")
            _read_slots(dataset, 0, 1)
            _read_slots(dataset, dataset.shape[0] - 1, dataset.shape[0])
            return DayFile(path, city or path.absolute().parent.parent.name, path.name[:8], dataset.shape)


def _first_dataset(file: h5py.File) -> h5py.Dataset:
    for item in file.values():
        if isinstance(item, h5py.Dataset):
            return item
    raise DataError(
        f"{file.filename} holds no dataset, expected one (slots, H, W, C); download it again or leave it out"
    )


def _read_slots(dataset: h5py.Dataset, start: int, stop: int) -> np.ndarray:
    values: np.ndarray = dataset[start:stop]
    if values.dtype != np.uint8 and (values.min() < 0 or values.max() > 255):
        raise ValueError(f"values {values.min()}..{values.max()}, expected 0..255")
    return values


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Turn what h5py raises on damaged files into a DataError that begins with `what`."""
    try:
        yield
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        raise DataError(
            f"{what} cannot be read ({_one_line(error)}); download the file again or leave it out"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _window_starts(
    day: DayFile, frames: int, slots: tuple[int, int] | None, stride: int, starts: Sequence[int] | None
) -> Sequence[int]:
    held = day.slot_range(slots)
    if starts is not None:
        for start in starts:
            if not held.start <= start <= held.stop - frames:
                raise DataError(
                    f"starts: a window of {frames} frames from slot {start} leaves slots ({held.start}, {held.stop}) "
                    f"of {day.path}"
                )
        return tuple(int(start) for start in starts)
    if slots is not None and len(held) < frames:
        raise DataError(f"slots=({held.start}, {held.stop}) holds no window of frames={frames}")
    return range(held.start, held.stop - frames + 1, stride)


def check_frame_sizes(days: Sequence[DayFile]) -> None:
    """DataError naming the first day whose (H, W, C) differs from the first day's."""
    for day in days:
        if day.shape[1:] != days[0].shape[1:]:
            raise DataError(
                f"{day.path} has frames {day.shape[1:]}, but {days[0].path} {days[0].shape[1:]} (H, W, C); "
                "use days of one frame size together"
            )


def _check_road_maps(road_maps: Mapping[str, torch.Tensor], days: Sequence[DayFile]) -> None:
    for day in days:
        expected = (1, *day.shape[1:3])
        if day.city not in road_maps:
            raise ValueError(f"road_maps has no map of {day.city}, only of {', '.join(road_maps)}")
        if road_maps[day.city].shape != expected:
            raise ValueError(f"road_maps[{day.city!r}] is {tuple(road_maps[day.city].shape)}, expected {expected}")
