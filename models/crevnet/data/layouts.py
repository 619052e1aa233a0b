"""How the files of each kind of data lie in folders, and what their names, channels and slots mean."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from crevnet.data.protocol import HeadingOrder, Protocol, headings, protocol

LayoutName = Literal["2019", "2021", "movies"]

_COUNTS = ("uint8", "int16")


class Layout(ABC):
    """One kind of data.

    Attributes:
        files: where the files of a split are, for people to read.
        dtypes: of the datasets: whole numbers in 0..255, or floating point in [0, 1].
        dated: files are days, and their slots share the day's 24 hours.
    """

    files: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...]] = _COUNTS
    dated: ClassVar[bool] = True

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
