"""The files of a submission, in a folder or a zip, and everything that is wrong with them."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from crevnet.competition.interface import CaseFile
from crevnet.data import DataError


class Submission:
    """The files in a folder or a zip; DataError if it is neither."""

    def __init__(self, path: Path) -> None:
        if path.is_dir():
            self.names = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
            self._read = lambda name: (path / name).read_bytes()
            return
        try:
            archive = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile) as error:
            raise DataError(
                f"{path} is neither a folder nor a zip ({error}); expected what crevnet submit wrote"
            ) from error
        self.names = {entry.filename for entry in archive.infolist() if not entry.is_dir()}
        self._read = archive.read

    @contextmanager
    def open(self, name: str) -> Iterator[h5py.File]:
        """Raises ValueError if the file cannot be read."""
        try:
            with h5py.File(io.BytesIO(self._read(name)), "r") as file:
                yield file
        except (OSError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"cannot be read ({' '.join(str(error).split())})") from error


def problems(submission: Submission, files: Sequence[CaseFile]) -> list[str]:
    """What keeps a submission from being scored, a line each that begins with a file's name: files that are missing,
    not asked for, or not as they should be. Reads all of them."""
    asked = {file.name for file in files}
    extra = [f"{name}: not asked for" for name in sorted(submission.names - asked)]
    return extra + [f"{file.name}: {problem}" for file in files for problem in _problems_of(submission, file)]


def _problems_of(submission: Submission, file: CaseFile) -> Iterator[str]:
    if file.name not in submission.names:
        yield "missing"
        return
    try:
        with submission.open(file.name) as found:
            if not isinstance(found.get("array"), h5py.Dataset):
                yield f"has no dataset 'array', only {', '.join(found) or 'nothing'}"
                return
            array = found["array"]
            if array.shape != file.shape:
                yield f"has shape {array.shape}, expected {file.shape}"
            if array.dtype != np.uint8:
                yield f"has dtype {array.dtype}, expected uint8"
            # Damage shows when values are read, case by case, since a file may be larger than memory.
            if array.ndim and sum(int((values != values).any()) for values in array):
                yield "holds NaN"
    except ValueError as error:
        yield str(error)
