"""Interface of a challenge: files of test cases, each answered by one file of predictions, and the unit of errors.

Shapes: P scored horizons, and frames of C channels and H x W pixels. Values are uint8, 0..255. In all challenges the score is
the mean squared error in the challenge's unit, averaged over a file, over a city's files, and over cities. The score is computed
in `competition_scores.py`; a challenge only defines the unit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from crevnet.data.files.days import DayFile
from crevnet.data.files.protocol import Protocol


@dataclass(frozen=True)
class Case:
    """One test case: the given frames and their time.

    Attributes:
        day: the day of the given frames. If only the weekday is known, any day with that weekday.
        first: the first slot after the given frames.
        past: the given frames, uint8 (12, H, W, C).
    """

    day: DayFile
    first: int
    past: np.ndarray


class CaseFile(ABC):
    """The test cases that one file of a submission answers.

    Attributes:
        city: the city of the test cases.
        name: path of the answering file within a submission, with slashes.
        shape: (cases, P, H, W, C), the shape of its uint8 dataset `array`.
    """

    city: str
    name: str
    shape: tuple[int, int, int, int, int]

    @abstractmethod
    def case(self, index: int) -> Case:
        """The test case `index`; DataError if it cannot be read."""

    @abstractmethod
    def truth(self, index: int) -> np.ndarray:
        """The true frames of that case, uint8 (P, H, W, C); DataError if they are missing or cannot be read."""


class Challenge(ABC):
    """The task of one competition.

    Attributes:
        protocol: the given frames and the frames to predict.
        unit: factor from the squared error of values in 0..255 to the score.
    """

    protocol: Protocol
    unit: float

    @abstractmethod
    def case_files(self, root: Path, cities: Sequence[str] | None) -> list[CaseFile]:
        """All files of test cases below `root`, by city; `cities` None means every city.

        Raises DataError if there are none, or if a file is damaged.
        """

    @abstractmethod
    def hold_out(self, days: Sequence[DayFile], count: int, rng: np.random.Generator, out: Path) -> Iterator[Path]:
        """Make test cases and their truth from full days of one city, in the places where `case_files(out)` finds them.

        At most `count` are drawn. Yields the path of each file once it is written, or if it exists from the same draw. Raises
        DataError for another file at such a path, and for days that are too short.
        """
