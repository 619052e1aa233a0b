"""What a challenge is: files of test cases, each answered by one file of predictions, and a unit in which errors count.

Shapes: P horizons that are asked for, H x W a frame's height and width, C its channels. Values are uint8, 0..255. In all
challenges the score is the mean squared error, in the challenge's unit, over a file, over a city's files, over cities.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from crevnet.data import DayFile
from crevnet.data.files.protocol import Protocol


@dataclass(frozen=True)
class Case:
    """One test case: the frames that are given, and when they were.

    Attributes:
        day: the day that they are from. Where its weekday alone is known, any day of that weekday.
        first: the first slot after them.
        past: uint8 (12, H, W, C).
    """

    day: DayFile
    first: int
    past: np.ndarray


class CaseFile(ABC):
    """The test cases that one file of a submission answers.

    Attributes:
        city: whose they are.
        name: of the file that answers them, within a submission; with slashes.
        shape: (cases, P, H, W, C) of the dataset `array` in it, uint8.
    """

    city: str
    name: str
    shape: tuple[int, int, int, int, int]

    @abstractmethod
    def case(self, index: int) -> Case:
        """One of its cases; DataError if it cannot be read."""

    @abstractmethod
    def truth(self, index: int) -> np.ndarray:
        """What was to be predicted in that case, uint8 (P, H, W, C); DataError if there is no truth that can be read."""


class Challenge(ABC):
    """What one of the competitions asks for.

    Attributes:
        protocol: what is to be predicted from what.
        unit: an error of 1 of 255 counts as so much.
    """

    protocol: Protocol
    unit: float

    @abstractmethod
    def case_files(self, root: Path, cities: Sequence[str] | None) -> list[CaseFile]:
        """All test cases below a folder, by city; `cities` None takes every city. DataError without any, or if damaged."""

    @abstractmethod
    def hold_out(self, days: Sequence[DayFile], count: int, rng: np.random.Generator, out: Path) -> Iterator[Path]:
        """Make test cases of full days of one city, with the truth beside them, where `case_files(out)` finds them.

        At most `count` are drawn. Gives the path of each file when it is written, or was there from the same draw; DataError if
        another file is in its place, or days are too short.
        """
