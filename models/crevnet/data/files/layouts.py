"""For each kind of data, where its files are in folders, and the meaning of their names, channels and slots."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from crevnet.data.errors import DataError
from crevnet.data.files.protocol import HeadingOrder, LayoutName, Protocol, headings, protocol
from crevnet.machine.files import quoted

_COUNTS = ("uint8", "int16")


class Layout(ABC):
    """One kind of data.

    Attributes:
        files: pattern of the paths of a split's files, for messages.
        dtypes: accepted dtypes of the datasets: integers in 0..255, or floating point in [0, 1].
        dated: whether files are days, whose slots divide 24 hours evenly.
        has_roads: whether frames show a city, so that pixels with data are its roads.
        noun: the word for one file, in messages.
        axes: shape of the datasets, for messages.
        dtype_remedy: remedy for any other dtype.
        made_by: how to create such data.
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
        """City -> sorted paths of its files in the split; cities without files are omitted. Raises OSError."""

    def holds(self, path: Path) -> bool:
        """Whether a file's name matches this layout."""
        return path.suffix == ".h5" and not path.name.startswith(".")

    @abstractmethod
    def date(self, path: Path) -> str:
        """The date of a day file, YYYYMMDD, or the name of a video."""

    def static_file(self, root: Path, city: str) -> Path | None:
        """The file of a city's road map and connectivity; None for layouts without such files."""
        return None

    def turn_headings(self, frames: Tensor, turned: Callable[[str], str]) -> Tensor:
        """Frames (T, C, H, W) with each heading (NW, NE, SW or SE) replaced by `turned(heading)`."""
        return frames

    def horizons(self, horizon: int) -> tuple[int, ...]:
        """The predicted frames to score, 1 being the first: all, or a competition's if `horizon` matches the competition."""
        return tuple(range(1, horizon + 1))

    def channel_name(self, channel: int) -> str:
        return f"channel {channel}"

    def lead(self, frames: int) -> str:
        """A lead time of `frames` frames, as text."""
        return f"{5 * frames:+d} min"

    def time(self, slot: int) -> str:
        return f"{slot // 12:02d}:{slot % 12 * 5:02d}"

    def named(self, city: str, date: str) -> str:
        """A file, in the terms that select it."""
        return f"{city} {date}"

    def shape_remedy(self, shape: tuple[int, ...]) -> str:
        """Remedy for a dataset whose shape is not valid for frames."""
        return "leave it out"

    def channels_remedy(self, shape: tuple[int, ...]) -> str:
        """Remedy for frames whose number of channels differs from the model's."""
        return "set --model.channels"

    def parting_remedy(self, root: Path, splits: tuple[str, str]) -> str:
        """Remedy if the training and validation splits have the same files."""
        return (
            "split days with --data.validation_dates, or slots with --data.training_slots and --data.validation_slots, "
            "or choose another --data.validation_split"
        )

    def value_error(self, path: Path, start: int, values: np.ndarray, largest: int) -> Exception:
        """The error for slots (T, H, W, C) from `start` with values outside 0..largest. A ValueError means damage."""
        return ValueError(f"values {values.min()}..{values.max()}, expected 0..{largest}")

    def length_error(self, lengths: Mapping[Path, int], past: int, horizon: int) -> DataError | None:
        """The error if all files (path -> number of slots) are too short for a window; None leaves the check to `Windows`."""
        return None


class Competition(Layout):
    """Folders of a competition: one per city, which contains one per split."""

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
    """(288, 495, 436, 3) per day: five-minute slots in UTC, pixels of 100 m; volume, mean speed and majority heading."""

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
    """(288, 495, 436, 8) per day: volume and mean speed for each of four headings; slots in local time."""

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
    """The user's own videos, (frames, H, W, C), of any lengths: no cities, dates, headings or time of day."""

    files = "<root>/{split}/*.h5, or <root>/*.h5 for all splits"
    dtypes = (*_COUNTS, "float16", "float32", "float64")
    dated = False
    has_roads = False
    noun = "video"
    axes = "(frames, H, W, C), channels last"
    dtype_remedy = "convert it to uint8, or to floats in [0, 1]"
    made_by = "make videos with `crevnet data moving-mnist`"

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
        return (
            f"its shape {shape} is read as {self.axes}; move the channel axis last, or set --model.channels {shape[3]}"
        )

    def parting_remedy(self, root: Path, splits: tuple[str, str]) -> str:
        if root.absolute().name in splits:
            return f"did you mean --data.root {quoted(root.parent)}?"
        folders = " and ".join(str(root / split) for split in splits)
        return f"put videos into {folders}, or split frames with --data.training_slots and --data.validation_slots"

    def value_error(self, path: Path, start: int, values: np.ndarray, largest: int) -> Exception:
        good = ((values >= 0) & (values <= largest)).all(axis=(1, 2, 3))  # False for NaN
        number = int(good.argmin())
        frame, where = values[number], f"{path}, frame {start + number}"
        if not np.isfinite(frame).all():
            return DataError(f"{where} has values that are not finite; replace them, or leave the file out")
        low, high = float(frame.min()), float(frame.max())
        if largest == 1 and low >= 0 and 2 < high <= 255:  # up to 2, values may exceed 1 by sharpening
            digits, remedy = ".3g", "divide by 255, or store uint8"
        else:
            digits, remedy = ".7g", f"scale or clip them to [0, {largest}]"
        return DataError(f"{where} has values {low:{digits}}..{high:{digits}}, expected 0..{largest}; {remedy}")

    def length_error(self, lengths: Mapping[Path, int], past: int, horizon: int) -> DataError | None:
        longest = max(lengths, key=lengths.__getitem__)
        if lengths[longest] >= past + horizon:
            return None
        return DataError(
            f"{longest}, the longest video, has {lengths[longest]} frames; expected at least {past + horizon}, "
            f"--model.past {past} + --model.horizon {horizon}: lower these, or use longer videos"
        )


TRAFFIC4CAST_2019 = Traffic4cast2019()
"""The default layout."""


def layout_named(name: LayoutName, heading_order: HeadingOrder = "ne-se-sw-nw") -> Layout:
    """The layout of that name; `heading_order` applies to 2021, as in `protocol`."""
    if name == "2019":
        return TRAFFIC4CAST_2019
    return Movies() if name == "movies" else Traffic4cast2021(heading_order)


def layout_of(path: Path) -> Layout:
    """The layout that matches a file's name: a competition's, or else that of videos."""
    known: tuple[Competition, ...] = (TRAFFIC4CAST_2019, Traffic4cast2021("ne-se-sw-nw"))
    return next((layout for layout in known if layout.holds(path)), Movies())
