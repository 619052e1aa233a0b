"""Every file that CrevNet reads: an honest one of each sort, and what a command takes from it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import days_2021
import h5py
import numpy as np

from crevnet.data.errors import DataError
from crevnet.data.files.dates import read_dates
from crevnet.data.files.days import DayReader, open_day, open_days
from crevnet.data.files.layouts import layout_named
from crevnet.data.made.made_files import making
from crevnet.data.made.repack import repack
from crevnet.data.maps.cache import read_cached, write_cached
from crevnet.data.maps.static import read_static
from crevnet.traffic4cast.challenge2019 import Challenge2019
from crevnet.traffic4cast.challenge2021 import Challenge2021
from crevnet.traffic4cast.checking import Submission, problems
from crevnet.traffic4cast.files import writing_array
from crevnet.traffic4cast.submission import zip_submission
from crevnet.training.checkpoint_reading import load_checkpoint
from crevnet.training.settings import load_settings

SEALED, WHOLE = 0.03, 0.0
"""Files with a checksum of each chunk and of where they are, and files with one of everything."""


@dataclass(frozen=True)
class Reader:
    """A file, and what is read of it: arrays, or nothing that can be compared."""

    path: Path
    read: Callable[[], Any]
    silent: float = 1
    """The share that may be read as other values: all without a checksum, none where it is of the whole file. A sealed HDF5 file
    may have rare ones: h5py does not show all of a chunk's key in the index, and half of the mutations here are aimed at it."""


def readers(
    root: Path, run: Path, points: Callable[..., np.ndarray], write_day: Callable[..., Path]
) -> dict[str, Reader]:
    """Written below `root`; `run` is a finished run's folder, to be damaged at will."""
    found = {}
    day = write_day(root / "2019", points(0, 40), "Here", "20180101", "validation")
    found["day of 2019"] = Reader(day, lambda: _frames(day))
    days_2021.write_cities(root / "2021")
    other = root / "2021" / "BERLIN" / "training" / "2019-01-01_BERLIN_8ch.h5"
    found["day of 2021"] = Reader(other, lambda: _frames(other))
    movie = root / "movies" / "movie.h5"
    with making(movie, (5, 8, 8, 1), "mark", "origin") as frames:
        frames[:] = points(1, 5, 8, 8)[..., :1]
    found["movie that we wrote"] = Reader(movie, lambda: _frames(movie), SEALED)
    floats = root / "movies" / "floats.h5"
    with h5py.File(floats, "w") as file:
        file["array"] = np.random.default_rng(0).random((5, 8, 8, 1), np.float32)
    found["movie of floats"] = Reader(floats, lambda: _frames(floats))
    found["repacked day"] = Reader(day, lambda: _repacked(day, root / "packed"))
    static = root / "2021" / "BERLIN" / "BERLIN_static.h5"
    found["static file"] = Reader(static, lambda: read_static(static, (21, 14)).numpy())
    found |= _of_2019(root / "2019", day) | _of_2021(root / "2021")
    checkpoint = run / "checkpoints" / "best.ckpt"
    found["checkpoint"] = Reader(checkpoint, lambda: _weights(run), WHOLE)
    found["config.yaml"] = Reader(run / "config.yaml", lambda: str(load_settings(run)) and None)
    dates = root / "dates.txt"
    dates.write_text("2019-01-01\n2019-01-02\n")
    found["dates"] = Reader(dates, lambda: read_dates("data.training_dates", dates) and None)
    cache = root / "cache.npy"
    write_cached(cache, [np.random.default_rng(0).random((4, 5), np.float32)], (4, 5))
    found["cache"] = Reader(cache, lambda: _cached(cache), WHOLE)
    return found


def _of_2019(root: Path, day: Path) -> dict[str, Reader]:
    challenge = Challenge2019([16, 34])
    list(challenge.hold_out(open_days(root, "validation"), 1, np.random.default_rng(0), root))
    test = root / "Here" / "Here_test" / day.name
    truth = root / "Here" / "Here_test_truth" / day.name
    out = root / "submission"
    answer = out / "Here" / "Here_test" / day.name
    with writing_array(answer, (2, 3, 21, 14, 3)) as array:
        array[:] = np.random.default_rng(0).integers(0, 256, array.shape, np.uint8)
    archive = zip_submission(out)

    def cases() -> Any:
        [file] = challenge.case_files(root, None)
        return np.concatenate([file.case(0).past, file.case(1).past])

    def truths() -> Any:
        [file] = challenge.case_files(root, None)
        return np.stack([file.truth(0), file.truth(1)])

    files = challenge.case_files(root, None)

    def submitted(path: Path) -> Any:
        submission = Submission(path)
        wrong = problems(submission, files)
        if wrong:
            raise DataError(f"{path}: {'; '.join(wrong)}")
        with submission.open(files[0]) as array:
            return array[()]

    return {
        "test day of 2019": Reader(test, cases, SEALED),
        "truth of 2019": Reader(truth, truths),
        "submission": Reader(answer, lambda: submitted(out), SEALED),
        "submission in a zip": Reader(archive, lambda: submitted(archive), WHOLE),
    }


def _of_2021(root: Path) -> dict[str, Reader]:
    challenge = Challenge2021("temporal")
    days = open_days(root, "training", ["BERLIN"], layout=layout_named("2021"))
    list(challenge.hold_out(days, 2, np.random.default_rng(0), root))
    names = ("test_temporal", "test_additional_temporal", "test_temporal_truth")
    paths = [root / "BERLIN" / f"BERLIN_{name}.h5" for name in names]

    def case() -> Any:
        [file] = challenge.case_files(root, None)
        found = file.case(0)
        return np.append(found.past.ravel(), [int(found.day.date), found.first])

    def truth() -> Any:
        [file] = challenge.case_files(root, None)
        return file.truth(0)

    reads = (case, case, truth)
    return {f"{path.stem}": Reader(path, read, SEALED) for path, read in zip(paths, reads, strict=True)}


def _frames(path: Path) -> Any:
    day = open_day(path)
    return DayReader().read(replace(day), 0, day.shape[0])


def _repacked(day: Path, target: Path) -> Any:
    copy = target / day.name
    copy.unlink(missing_ok=True)
    repack(day.parent, target)
    with h5py.File(copy) as file:
        return next(iter(file.values()))[()]


def _weights(run: Path) -> Any:
    found = load_checkpoint(run, "best")["state_dict"]
    return np.concatenate([found[name].numpy().ravel() for name in sorted(found)])


def _cached(path: Path) -> Any:
    found = read_cached(path, (4, 5), np.float32)
    if found is None:
        raise DataError(f"{path} is computed again")
    return found.copy()


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """Another content: flipped bits, foreign numbers, a part that is lost, zero, doubled or of something else. Half of all are
    among the first bytes, where formats have what describes them."""
    changed = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        end = len(changed) if rng.random() < 0.5 else min(len(changed), 2500)
        place = int(rng.integers(max(end, 1)))
        length = int(2 ** rng.uniform(0, 8))
        match rng.integers(7):
            case 0 | 1:
                if place < len(changed):
                    changed[place] ^= 1 << int(rng.integers(8))
            case 2:
                number = int(
                    rng.choice([0, 1, 2**7, 2**8, 2**16, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1], shuffle=False)
                )
                width = int(rng.choice([1, 2, 4, 8]))
                changed[place : place + width] = (number % 256**width).to_bytes(width, "little")
            case 3:
                changed[place : place + length] = bytes(len(changed[place : place + length]))
            case 4:
                changed[place : place + length] = rng.bytes(length)
            case 5:
                changed[place:place] = changed[place : place + length]
            case 6:
                del changed[place if rng.random() < 0.2 else max(place, len(changed) - length) :]
    return bytes(changed)
