"""Reads the files of a submission, in a folder or a zip, and lists their problems."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import BinaryIO

import h5py
import numpy as np

from crevnet.data.errors import DataError
from crevnet.data.files.hdf5_reading import UNREADABLE, array_of, check_unpacked_sizes, opened_file
from crevnet.machine.files import check_regular
from crevnet.traffic4cast.interface import CaseFile

_NO_ZIP = (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, struct.error, EOFError, IndexError)
_PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Accepted compression methods. Others decompress a whole entry, even if only some bytes are read."""
_MOST_LISTED = 20


class Submission:
    """The untrusted files in a folder or a zip; DataError if the path is neither."""

    def __init__(self, path: Path) -> None:
        self._folder, self._archive = path, None
        if path.is_dir():
            self.names = {file.relative_to(path).as_posix() for file in path.rglob("*") if not file.is_dir()}
            return
        try:
            check_regular(path)
            self._archive = zipfile.ZipFile(path)
        except _NO_ZIP as error:
            raise DataError(
                f"{path} is neither a folder nor a zip ({error}); expected the output of crevnet submit: check the path"
            ) from error
        self.names = {entry.filename for entry in self._archive.infolist() if not entry.is_dir()}

    @contextmanager
    def open(self, asked: CaseFile) -> Iterator[h5py.Dataset]:
        """The predictions of a file of test cases. Raises ValueError if they cannot be read."""
        try:
            with opened_file(self._source(asked)) as file:
                yield array_of(file)
        except (*UNREADABLE, *_NO_ZIP) as error:
            raise ValueError(f"cannot be read ({' '.join(str(error).split())})") from error

    def _source(self, asked: CaseFile) -> Path | BinaryIO:
        if self._archive is not None:
            return io.BytesIO(_unpacked(self._archive, asked))
        path = self._folder / asked.name
        if path.is_symlink():  # to any other file, even the truth
            raise ValueError("it is a symbolic link, expected the file itself: copy it there")
        return path


def _unpacked(archive: zipfile.ZipFile, asked: CaseFile) -> bytes:
    """The bytes of an entry; ValueError if they exceed the size of uncompressed predictions. Its declared size is not trusted."""
    entry, most = archive.getinfo(asked.name), prod(asked.shape) * 9 // 8 + 2**20
    if entry.compress_type not in _PACKED:
        raise ValueError(f"it is compressed by method {entry.compress_type}, expected stored or deflated: zip it again")
    with archive.open(entry) as file:
        content = b"" if entry.file_size > most else file.read(most + 1)
    if entry.file_size > most or len(content) > most:
        raise ValueError(
            f"it decompresses to {max(entry.file_size, len(content))} bytes or more, expected at most {most} for "
            f"{asked.shape} uint8"
        )
    return content


def problems(submission: Submission, files: Sequence[CaseFile]) -> list[str]:
    """Reasons why a submission cannot be scored, one line each, beginning with a file's name.

    A file may be missing, unexpected or invalid. All files are read.
    """
    asked = {file.name for file in files}
    extra = [f"{_shown(name)}: unexpected" for name in sorted(submission.names - asked)]
    if len(extra) > _MOST_LISTED:
        extra[_MOST_LISTED:] = [f"{len(extra) - _MOST_LISTED} more files: unexpected"]
    return extra + [f"{file.name}: {problem}" for file in files for problem in _problems_of(submission, file)]


def _shown(name: str) -> str:
    """An untrusted name: line breaks and control characters are escaped, and the length is limited."""
    return (name if name.isprintable() else ascii(name))[:200]


def _problems_of(submission: Submission, file: CaseFile) -> Iterator[str]:
    if file.name not in submission.names:
        yield "missing"
        return
    try:
        with submission.open(file) as array:
            if array.dtype != np.uint8:
                yield f"has dtype {array.dtype}, expected uint8"
            if array.shape != file.shape:
                yield f"has shape {array.shape}, expected {file.shape}"
                return  # without reading its values, of which there may be any number
            check_unpacked_sizes(array)
            # Reading the values reveals damage. They are read case by case, since a file may be larger than memory.
            if sum(int((values != values).any()) for values in array):
                yield "contains NaN"
    except ValueError as error:
        yield str(error)
