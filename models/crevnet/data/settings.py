"""The settings of a run's data: a section of its configuration file and of the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from crevnet.data.files.dates import read_dates
from crevnet.data.files.protocol import HeadingOrder, LayoutName

Flips = Literal["none", "horizontal", "vertical", "both"]


@dataclass(frozen=True)
class DataSettings:
    """Data.

    Args:
        root: folder with the cities. 2019: <root>/<City>/<City>_training/YYYYMMDD_100m_bins.h5. 2021:
            <root>/<CITY>/training/YYYY-MM-DD_<CITY>_8ch.h5. Videos: <root>/training/*.h5.
        protocol: kind of data in the folder. Movies are videos in HDF5 files (frames, H, W, C), uint8 or int16 in 0..255, or
            floating point in [0, 1].
        heading_order: order of the heading channels (2021). The organizers' own files disagree about it.
        cities: names of the cities, by default all.
        training_split: name of the folders of training days within each city.
        training_dates: dates of the training days, YYYY-MM-DD, by default all. A list, or a text file with one date per line.
            Missing days are skipped. If training and validation days share a folder, the default excludes validation_dates.
        training_slots: range of time slots in each training day, by default all. The end is excluded. In a shorter
            video, the range ends with the video.
        validation_split: name of the folders of validation days within each city.
        validation_dates: dates of the validation days, by default all. A list, or a text file with one date per line.
        validation_slots: range of time slots in each validation day, by default all. The end is excluded.
        validation_windows: choice of validation windows. "strided" takes one every validation_stride time slots. "test" takes
            those before the five time slots per city that the competition of 2019 predicts.
        stride: number of time slots between the starts of training windows.
        validation_stride: number of time slots between the starts of validation windows, by default without overlap.
        flips: mirror images among the training windows: horizontal (east-west), vertical (north-south) or both. Headings are
            also mirrored. Each epoch draws, for every window, one of its images or the window itself.
        skip_damaged: whether to skip damaged day files with a warning, instead of an error.
        batch_size: number of windows per batch and device.
        workers: number of processes that load data. 0 loads in the training process.
    """

    root: Path | None = None
    protocol: LayoutName = "2019"
    heading_order: HeadingOrder = "ne-se-sw-nw"
    cities: list[str] | None = None
    training_split: str = "training"
    training_dates: list[str] | Path | None = None
    training_slots: tuple[int, int] | None = None
    validation_split: str = "validation"
    validation_dates: list[str] | Path | None = None
    validation_slots: tuple[int, int] | None = None
    validation_windows: Literal["strided", "test"] = "strided"
    stride: int = 1
    validation_stride: int | None = None
    flips: Flips = "none"
    skip_damaged: bool = False
    batch_size: int = 1
    workers: int = 0

    def __post_init__(self) -> None:
        for name in ("stride", "batch_size", "validation_stride"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"data.{name} must be at least 1, not {value}")
        if self.cities == []:
            raise ValueError("data.cities names no city: name at least one, or omit it for all")
        if self.workers < 0:
            raise ValueError(f"data.workers cannot be negative; got {self.workers}")
        for name in ("training_dates", "validation_dates"):  # stored as dates, because a file might change
            object.__setattr__(self, name, read_dates(f"data.{name}", getattr(self, name)))
        for name in ("cities", "training_dates", "validation_dates"):
            if self.protocol == "movies" and getattr(self, name) is not None:
                raise ValueError(f"data.{name} is given, but videos have neither cities nor dates: omit it")
        if self.validation_windows == "test" and self.protocol != "2019":
            raise ValueError(
                f"data.validation_windows test requires data.protocol 2019, not {self.protocol}: use strided"
            )
