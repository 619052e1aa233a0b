"""Opens and checks files of frames, which are days of a city or videos, and reads them slot by slot.

The first dataset of a file (usually `array`) has shape (slots, H, W, C). Its values are in 0..255, or in [0, 1] for videos in
floating point. Any sizes are accepted, as long as the files that are used together agree on H, W and C.
"""

import importlib
import os
import warnings
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date as Date
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from crevnet.data.errors import DataError, UndamagedError, refuse_undamaged
from crevnet.data.files.dates import DateChoice
from crevnet.data.files.layouts import TRAFFIC4CAST_2019, Layout, layout_of
from crevnet.data.files.safe_h5 import UNREADABLE, all_datasets, check_dataset, names, open_file
from crevnet.machine.files import check_regular

_MAX_OPEN_FILES = 32


@dataclass(frozen=True)
class DayFile:
    """One day of one city, or one video: `date` is YYYYMMDD, or the video's name; `shape` is (slots, H, W, C)."""

    path: Path
    city: str
    date: str
    shape: tuple[int, int, int, int]
    layout: Layout = field(default=TRAFFIC4CAST_2019, compare=False, repr=False)

    def slot_range(self, slots: tuple[int, int] | None) -> range:
        """The slots of the half-open range `slots` (None: the whole file); DataError if a day does not contain them.

        Videos differ in length: the range is cut at the end of a video, and may become empty.
        """
        held = self.shape[0]
        first, end = (0, held) if slots is None else slots
        if not 0 <= first < end or (self.layout.dated and end > held):
            raise DataError(
                f"slots=({first}, {end}) is not a range within {self.path}, which has {held} slots; choose one in [0, {held}]"
            )
        return range(min(first, held), min(end, held))


def open_days(
    root: str | os.PathLike[str],
    split: str = "training",
    cities: Sequence[str] | None = None,
    skip_damaged: bool = False,
    layout: Layout = TRAFFIC4CAST_2019,
    dates: DateChoice | None = None,
) -> list[DayFile]:
    """Find and check the files of a split, sorted by city and date.

    With `cities` None, every city with files in that split is included; with `dates` None, every day. The first and last frame
    of each file are read, so damage there is reported now. Damage between them is reported when a window is read. Raises
    DataError naming the first unusable file; with `skip_damaged`, warns (UserWarning) and skips it.
    """
    root = Path(root)
    expected = layout.files.format(split=split)
    found = _find(root, split, layout)
    if not found:
        raise DataError(
            f"{root} has no file of split {split!r}; expected {expected}: check --data.root, the split and --data.protocol"
        )
    for city in cities or ():
        if city not in found:
            raise DataError(
                f"{root} has no file of {city}; found {', '.join(found)}; expected {expected}: check --data.cities"
            )
    chosen = {city: found[city] for city in (found if cities is None else dict.fromkeys(cities))}
    paths = [
        (path, city) for city in chosen for path in chosen[city] if dates is None or dates.takes(layout.date(path))
    ]
    if not paths:
        raise DataError(f"{root} has no day for {dates.option} in split {split!r}: check the lists of dates")

    def reject(error: DataError) -> None:
        if not skip_damaged or isinstance(error, UndamagedError):
            raise error
        warnings.warn(f"left out: {error}", stacklevel=3)

    days = []
    for path, city in paths:
        try:
            days.append(open_day(path, city, layout))
        except DataError as error:
            reject(error)
    # The most common frame size is the expected one, so a single odd file is the one named, even if it comes first.
    sizes = Counter(day.shape[1:] for day in days)
    size = max(sizes, key=sizes.__getitem__, default=None)
    for day in days:
        if day.shape[1:] != size:
            reject(DataError(f"{day.path} has frames {day.shape[1:]}, the other files {size} (H, W, C); leave it out"))
    days = [day for day in days if day.shape[1:] == size]
    if not days:
        raise DataError(f"{root} has no undamaged file of split {split!r}; download the files again")
    return days


def open_day(path: Path, city: str | None = None, layout: Layout | None = None) -> DayFile:
    """Check one file. Raises DataError if it is damaged.

    Args:
        path: an HDF5 file.
        city: by default, the name of the folder that contains the split's folder.
        layout: by default, derived from the file's name.
    """
    layout = layout or layout_of(path)
    date = layout.date(path)
    if layout.dated and not _is_date(date):
        raise DataError(f"{path} is named after {date}, which is not a date; rename it or leave it out")
    with naming(str(path)), opened(path) as dataset:
        if dataset.ndim != 4 or 0 in dataset.shape:
            remedy = layout.shape_remedy(dataset.shape)
            raise DataError(
                f"{path}, dataset {_name(dataset)}, has shape {dataset.shape}, expected {layout.axes}, none 0; {remedy}"
            )
        if dataset.dtype.name not in layout.dtypes:
            expected = f"{', '.join(layout.dtypes[:-1])} or {layout.dtypes[-1]}"
            raise DataError(
                f"{path}, dataset {_name(dataset)}, has dtype {dataset.dtype}, expected {expected}; {layout.dtype_remedy}"
            )
        _read_slots(dataset, 0, 1, layout)
        _read_slots(dataset, dataset.shape[0] - 1, dataset.shape[0], layout)
        return DayFile(path, city or path.absolute().parent.parent.name, date, dataset.shape, layout)


@contextmanager
def opened(path: Path) -> Iterator[h5py.Dataset]:
    """A file's first dataset, open within the context."""
    dataset = open_dataset(path)
    with dataset.file:
        yield dataset


def open_dataset(path: Path) -> h5py.Dataset:
    """A file's first dataset; the caller closes its file. DataError naming the file if it cannot be opened."""
    with naming(str(path)):
        if path.is_dir():
            raise DataError(f"{path} is a folder, expected an HDF5 file; move it away")
        check_regular(path)
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty (0 bytes), expected an HDF5 file; download it again or leave it out")
        return _first_dataset(open_file(path))


class DayReader:
    """Reads slots of day files. It holds the most recently used files open; each process has its own handles."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, h5py.Dataset] = OrderedDict()
        self._process = os.getpid()

    def __reduce__(self) -> tuple[type["DayReader"], tuple[()]]:
        return DayReader, ()

    def read(self, day: DayFile, start: int, stop: int) -> np.ndarray:
        """Slots start..stop-1 of a day, (stop - start, H, W, C), in the stored dtype.

        Raises DataError naming file and slots if they are damaged.
        """
        with naming(f"{day.path}, slots {start} to {stop - 1},"):
            return _read_slots(self._dataset(day.path), start, stop, day.layout)

    def _dataset(self, path: Path) -> h5py.Dataset:
        if self._process != os.getpid():
            # Otherwise HDF5 would give a forked worker the parent's handle, whose file offset both would share.
            while self._open:
                self._close_oldest()
            self._process = os.getpid()
        if path not in self._open:
            if len(self._open) >= _MAX_OPEN_FILES:
                self._close_oldest()
            self._open[path] = open_dataset(path)
        self._open.move_to_end(path)
        return self._open[path]

    def _close_oldest(self) -> None:
        _, dataset = self._open.popitem(last=False)
        dataset.file.close()


def sample_frames(days: Sequence[DayFile], slots: tuple[int, int] | None, frames: int) -> Iterator[np.ndarray]:
    """At most `frames` frames (H, W, C), in the stored dtype, spread evenly over the range `slots` of `days`.

    The range is half-open; None is the whole day.
    """
    held = [(day, slot) for day in days for slot in day.slot_range(slots)]
    if not held:
        raise DataError(f"slots={slots} has no frame in any of {len(days)} files; use an earlier range or longer files")
    chosen = [held[i * len(held) // frames] for i in range(frames)] if frames < len(held) else held
    reader = DayReader()
    for day, slot in chosen:
        yield reader.read(day, slot, slot + 1)[0]


def check_frame_sizes(days: Sequence[DayFile]) -> None:
    """DataError naming the first day whose (H, W, C) differs from the first day's."""
    for day in days:
        if day.shape[1:] != days[0].shape[1:]:
            raise DataError(
                f"{day.path} has frames {day.shape[1:]}, but {days[0].path} has {days[0].shape[1:]} (H, W, C); "
                "use only days of one frame size together"
            )


def unit_interval(stored: Tensor) -> Tensor:
    """Stored frames as float32 in [0, 1]: integers divided by 255 in a new tensor, floating point without scaling."""
    values = stored.to(torch.float32)
    return values if stored.is_floating_point() else values.div_(255)


def _find(root: Path, split: str, layout: Layout) -> dict[str, list[Path]]:
    try:
        return layout.find(root, split)
    except OSError as error:
        expected = layout.files.format(split=split)
        raise DataError(f"{root} cannot be listed ({_one_line(error)}); expected {expected}: check the path") from error


def _is_date(date: str) -> bool:
    try:
        Date.fromisoformat(date)
    except ValueError:
        return False
    return True


def _first_dataset(file: h5py.File) -> h5py.Dataset:
    for name in names(file):
        item = file[name]
        if isinstance(item, h5py.Dataset):
            check_dataset(item)
            _load_codecs(item)
            return item
    inside = next(all_datasets(file), None)
    if inside is not None:
        raise DataError(
            f"{file.filename} has datasets only in groups, such as {_name(inside)}; expected the frames outside all groups: "
            "write them as 'array'"
        )
    raise DataError(f"{file.filename} has no dataset, expected one of frames; download it again or leave it out")


def _name(dataset: h5py.Dataset) -> str:
    """The dataset's name, quoted, since a file may have several."""
    return repr(dataset.name.removeprefix("/"))


def _load_codecs(dataset: h5py.Dataset) -> None:
    """Import hdf5plugin if the dataset uses a codec that HDF5 does not include. Other files do not require it."""
    properties = dataset.id.get_create_plist()
    for number in range(properties.get_nfilters()):
        code, *_, name = properties.get_filter(number)
        if h5py.h5z.filter_avail(code):
            continue
        try:
            importlib.import_module("hdf5plugin")
        except ImportError as error:
            raise DataError(
                f"{dataset.file.filename} is compressed with {name.decode()}: pip install hdf5plugin to read it"
            ) from error


def _read_slots(dataset: h5py.Dataset, start: int, stop: int, layout: Layout) -> np.ndarray:
    values: np.ndarray = dataset[start:stop]
    if values.dtype != np.uint8:
        largest = 1 if values.dtype.kind == "f" else 255
        if not (values.min() >= 0 and values.max() <= largest):  # also true for NaN
            raise layout.value_error(Path(dataset.file.filename), start, values, largest)
    return values


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Convert h5py's errors for damaged files into a DataError that begins with `what`."""
    try:
        yield
    except UNREADABLE as error:
        refuse_undamaged(what, error)
        raise DataError(
            f"{what} cannot be read ({_one_line(error)}); download the file again or leave it out"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
