"""How the files of each kind of data lie in folders, and what their names, channels and slots mean."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from crevnet.data.errors import DataError
from crevnet.data.files.protocol import HeadingOrder, Protocol, headings, protocol
from crevnet.machine.files import quoted

LayoutName = Literal["2019", "2021", "movies"]

_COUNTS = ("uint8", "int16")


class Layout(ABC):
    """One kind of data.

    Attributes:
        files: where the files of a split are, for people to read.
        dtypes: of the datasets: whole numbers in 0..255, or floating point in [0, 1].
        dated: files are days, and their slots share the day's 24 hours.
        has_roads: frames are of a city, and pixels that have data are its roads.
        noun: what one file is.
        axes: of the datasets.
        dtype_remedy: what to do about another dtype.
        made_by: how to come by such data.
    """

    files: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...]] = _COUNTS
    dated: ClassVar[bool] = True
    has_roads: ClassVar[bool] = True
    noun: ClassVar[str] = "day"
    axes: ClassVar[str] = "(slots, H, W, C)"
    dtype_remedy: ClassVar[str] = "leave it out"
    made_by: ClassVar[str] = "make a city with `crevnet data synth`"

    @abstractmethod
    def find(self, root: Path, split: str) -> dict[str, list[Path]]:
        """City -> paths of its files in the split, sorted; cities without any are left out. Raises OSError."""

    def holds(self, path: Path) -> bool:
        """Whether a file's name is one of this layout's."""
        return path.suffix == ".h5" and not path.name.startswith(".")

    @abstractmethod
    def date(self, path: Path) -> str:
        """YYYYMMDD of a day file; a movie's name."""

    def static_file(self, root: Path, city: str) -> Path | None:
        """Where a city's road map and connectivity are, in layouts that have such files."""
        return None

    def turn_headings(self, frames: Tensor, turned: Callable[[str], str]) -> Tensor:
        """Frames (T, C, H, W) in which whatever had a heading (NW, NE, SW or SE) has `turned(heading)`."""
        return frames

    def horizons(self, horizon: int) -> tuple[int, ...]:
        """Which of the frames that a model predicts are scored: all, or those of the competition that it was made for."""
        return tuple(range(1, horizon + 1))

    def channel_name(self, channel: int) -> str:
        return f"channel {channel}"

    def lead(self, frames: int) -> str:
        """So many frames later, in words."""
        return f"{5 * frames:+d} min"

    def time(self, slot: int) -> str:
        return f"{slot // 12:02d}:{slot % 12 * 5:02d}"

    def named(self, city: str, date: str) -> str:
        """A file, by what chooses it."""
        return f"{city} {date}"

    def shape_remedy(self, shape: tuple[int, ...]) -> str:
        """What to do about a dataset of a shape that frames cannot have."""
        return "leave it out"

    def channels_remedy(self, shape: tuple[int, ...]) -> str:
        """What to do about frames that have not as many channels as the model."""
        return "set --model.channels"

    def parting_remedy(self, root: Path, splits: tuple[str, str]) -> str:
        """What to do where both splits, to train and to validate on, have the same files."""
        return (
            "part days by --data.validation_dates, or slots by --data.training_slots and --data.validation_slots, "
            "or use another --data.validation_split"
        )

    def value_error(self, path: Path, start: int, values: np.ndarray, largest: int) -> Exception:
        """The error of slots (T, H, W, C), from `start` on, that are not all in 0..largest. A ValueError is damage."""
        return ValueError(f"values {values.min()}..{values.max()}, expected 0..{largest}")

    def length_error(self, lengths: Mapping[Path, int], past: int, horizon: int) -> DataError | None:
        """The error where all files, given with their slots, are too short for a window; None leaves it to `Windows`."""
        return None


class Competition(Layout):
    """Folders of a competition: one for each city, and in it one for each split."""

    protocol: Protocol
    _name: ClassVar[re.Pattern[str]]
    _split: ClassVar[str]

    def find(self, root: Path, split: str) -> dict[str, list[Path]]:
        found = {}
        for folder in sorted(root.iterdir()):
            split_folder = folder / self._split.format(city=folder.name, split=split)
            if split_folder.is_dir():
                paths = sorted(filter(self.holds, split_folder.iterdir()))
                if paths:
                    found[folder.name] = paths
        return found

    def holds(self, path: Path) -> bool:
        return self._name.fullmatch(path.name) is not None

    def date(self, path: Path) -> str:
        return path.name.partition("_")[0].replace("-", "")

    def horizons(self, horizon: int) -> tuple[int, ...]:
        return self.protocol.horizons if horizon == self.protocol.horizon else super().horizons(horizon)

    def channel_name(self, channel: int) -> str:
        names = self.protocol.channels
        return names[channel] if channel < len(names) else super().channel_name(channel)


class Traffic4cast2019(Competition):
    """(288, 495, 436, 3) a day: five-minute slots in UTC, pixels of 100 m, volume, mean speed and majority heading."""

    files = "<root>/<City>/<City>_{split}/YYYYMMDD_100m_bins.h5"
    protocol = protocol("2019")
    _name = re.compile(r"\d{8}_100m_bins\.h5")
    _split = "{city}_{split}"
    _heading_codes: ClassVar[dict[str, int]] = {"NW": 1, "NE": 85, "SW": 170, "SE": 255}

    def turn_headings(self, frames: Tensor, turned: Callable[[str], str]) -> Tensor:
        values = torch.arange(256)
        for heading, code in self._heading_codes.items():
            values[code] = self._heading_codes[turned(heading)]
        heading = (values.to(frames.dtype) / 255)[(frames[:, 2:3] * 255).round().long()]
        return torch.cat([frames[:, :2], heading, frames[:, 3:]], dim=1)


class Traffic4cast2021(Competition):
    """(288, 495, 436, 8) a day: volume and mean speed of each of four headings; slots in local time."""

    files = "<root>/<CITY>/{split}/YYYY-MM-DD_<CITY>_8ch.h5"
    _name = re.compile(r"\d{4}-\d{2}-\d{2}_.+_8ch\.h5")
    _split = "{split}"

    def __init__(self, heading_order: HeadingOrder) -> None:
        self.protocol = protocol("2021", heading_order)
        self._headings = headings(heading_order)

    def static_file(self, root: Path, city: str) -> Path:
        return root / city / f"{city}_static.h5"

    def turn_headings(self, frames: Tensor, turned: Callable[[str], str]) -> Tensor:
        pairs = {turned(heading): frames[:, 2 * n : 2 * n + 2] for n, heading in enumerate(self._headings)}
        return torch.cat([*(pairs[heading] for heading in self._headings), frames[:, 8:]], dim=1)


class Movies(Layout):
    """Movies of the user's own, (frames, H, W, C), of any lengths: without cities, dates, headings or the time of day."""

    files = "<root>/{split}/*.h5, or <root>/*.h5 for all splits"
    dtypes = (*_COUNTS, "float16", "float32", "float64")
    dated = False
    has_roads = False
    noun = "movie"
    axes = "(frames, H, W, C), channels last"
    dtype_remedy = "convert it to uint8, or to floats in [0, 1]"
    made_by = "make movies with `crevnet data moving-mnist`"

    def find(self, root: Path, split: str) -> dict[str, list[Path]]:
        folder = root / split if (root / split).is_dir() else root
        paths = sorted(filter(self.holds, folder.iterdir()))
        return {root.absolute().name: paths} if paths else {}

    def date(self, path: Path) -> str:
        return path.stem

    def lead(self, frames: int) -> str:
        return f"{frames:+d}"

    def time(self, slot: int) -> str:
        return f"frame {slot}"

    def named(self, city: str, date: str) -> str:
        return date

    def shape_remedy(self, shape: tuple[int, ...]) -> str:
        return "add a channel axis: array[..., None]" if len(shape) == 3 and 0 not in shape else "leave it out"

    def channels_remedy(self, shape: tuple[int, ...]) -> str:
        return f"its shape {shape} is read as {self.axes}; move the axis, or set --model.channels {shape[3]}"

    def parting_remedy(self, root: Path, splits: tuple[str, str]) -> str:
        if root.absolute().name in splits:
            return f"did you mean --data.root {quoted(root.parent)}?"
        folders = " and ".join(str(root / split) for split in splits)
        return f"put movies into {folders}, or part frames by --data.training_slots and --data.validation_slots"

    def value_error(self, path: Path, start: int, values: np.ndarray, largest: int) -> Exception:
        good = ((values >= 0) & (values <= largest)).all(axis=(1, 2, 3))  # False where one is NaN
        number = int(good.argmin())
        frame, where = values[number], f"{path}, frame {start + number}"
        if not np.isfinite(frame).all():
            return DataError(f"{where} holds values that are no numbers; replace them, or leave the file out")
        low, high = float(frame.min()), float(frame.max())
        if largest == 1 and low >= 0 and 2 < high <= 255:  # up to 2, it may have been sharpened
            digits, remedy = ".3g", "divide by 255, or store uint8"
        else:
            digits, remedy = ".7g", f"scale or clip them to [0, {largest}]"
        return DataError(f"{where} has values {low:{digits}}..{high:{digits}}, expected 0..{largest}; {remedy}")

    def length_error(self, lengths: Mapping[Path, int], past: int, horizon: int) -> DataError | None:
        longest = max(lengths, key=lengths.__getitem__)
        if lengths[longest] >= past + horizon:
            return None
        return DataError(
            f"{longest} has {lengths[longest]} frames, and no movie with it more; expected at least {past + horizon}, "
            f"--model.past {past} + --model.horizon {horizon}: lower these, or use longer movies"
        )


TRAFFIC4CAST_2019 = Traffic4cast2019()
"""The layout that is meant where none is named."""


def layout_named(name: LayoutName, heading_order: HeadingOrder = "ne-se-sw-nw") -> Layout:
    """The layout of that name; heading_order is 2021's, as in `protocol`."""
    if name == "2019":
        return TRAFFIC4CAST_2019
    return Movies() if name == "movies" else Traffic4cast2021(heading_order)


def layout_of(path: Path) -> Layout:
    """The layout that a file's name belongs to; a movie's, if it is no competition's."""
    known: tuple[Competition, ...] = (TRAFFIC4CAST_2019, Traffic4cast2021("ne-se-sw-nw"))
    return next((layout for layout in known if layout.holds(path)), Movies())
