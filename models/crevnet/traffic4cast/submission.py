"""Writes a submission: one file of predictions for each file of test cases, and a zip of all of them."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from crevnet.data.errors import DataError, refuse_undamaged
from crevnet.data.files.hdf5_reading import UNREADABLE, array_of, opened_file
from crevnet.data.made.made_files import text_attribute
from crevnet.machine.files import replacing
from crevnet.traffic4cast.files import writing_array
from crevnet.traffic4cast.forecasting import CaseForecast, submitted
from crevnet.traffic4cast.interface import CaseFile


def write_submission(
    files: Sequence[CaseFile],
    forecast: CaseForecast,
    out: Path,
    made_from: str,
    overwrite: bool,
    progress: Callable[[int], None],
) -> None:
    """Write a file of predictions for each file of test cases, except those that exist.

    Each file stores `made_from`, which identifies the runs and options, as an attribute of its dataset. An interrupted
    submission recognizes its finished files by it. Unless `overwrite` is set, a file with another `made_from` raises DataError
    before anything is computed. `progress` is called with the number of cases completed since the last call.
    """
    finished = {file.name for file in files if _origin(out / file.name) == made_from}
    for file in files:
        if (out / file.name).exists() and file.name not in finished and not overwrite:
            raise DataError(
                f"{out / file.name} was made from other runs or options: choose another --out, or add --overwrite"
            )
    for file in files:
        if file.name in finished:
            progress(file.shape[0])
            continue
        with writing_array(out / file.name, file.shape) as predictions:
            predictions.attrs["made_from"] = made_from
            for index in range(file.shape[0]):
                predictions[index] = submitted(forecast(file.case(index)))
                progress(1)


def zip_submission(out: Path) -> Path:
    """Zip all predictions in the folder `out` into `out`.zip, and return its path."""
    path = out.with_name(f"{out.name}.zip")
    with replacing(path) as partial, zipfile.ZipFile(partial, "w") as archive:  # not compressed, since the files are
        for file in sorted(out.rglob("*.h5")):
            archive.write(file, file.relative_to(out))
    return path


def _origin(path: Path) -> str | None:
    try:
        with opened_file(path) as file:
            return text_attribute(array_of(file), "made_from")
    except UNREADABLE as error:
        refuse_undamaged(str(path), error)
        return None
