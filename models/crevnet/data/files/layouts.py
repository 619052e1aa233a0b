"""For each kind of data, where its files are in folders, and the meaning of their names, channels and slots."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import ClassVar, get_args

import numpy as np
from torch import Tensor

from crevnet.data.errors import DataError
from crevnet.data.files.protocol import HeadingOrder, LayoutName

COUNTS = ("uint8", "int16")
"""Dtypes of integers in 0..255."""


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
    dtypes: ClassVar[tuple[str, ...]] = COUNTS
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


def layout_named(name: LayoutName, heading_order: HeadingOrder = "ne-se-sw-nw") -> Layout:
    """The layout of the file that has its name; `heading_order` applies to 2021, as in `protocol`."""
    layout: Layout = import_module(f"crevnet.data.files.layout_{name}").layout(heading_order)
    return layout


def layout_of(path: Path) -> Layout:
    """The first layout of `LayoutName` that matches a file's name, or else that of videos."""
    layouts = (layout_named(name) for name in get_args(LayoutName))
    return next((layout for layout in layouts if layout.holds(path)), layout_named("movies"))
