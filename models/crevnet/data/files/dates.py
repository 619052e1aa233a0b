"""Lists of dates: the days of a split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date as Date
from pathlib import Path

from crevnet.machine.files import read_text


@dataclass(frozen=True)
class DateChoice:
    """The dates of a split, YYYYMMDD: those in `listed`; if that is None, all dates that are not in `taken`."""

    option: str
    """The option that holds the list, or would hold it."""
    listed: Sequence[str] | None = None
    taken: Sequence[str] | None = None

    def takes(self, date: str) -> bool:
        known = {written.replace("-", "") for written in self.listed or self.taken or ()}
        return (date in known) == (self.listed is not None)


def read_dates(option: str, given: Sequence[str] | Path | None) -> list[str] | None:
    """Dates as YYYY-MM-DD, from a list or from a text file with one date per line; None stays None.

    Raises ValueError naming `option` for an invalid date, a file that cannot be read, and an empty list.
    """
    if given is None:
        return None
    written = _lines(option, given) if isinstance(given, Path) else list(given)
    if not written:
        raise ValueError(f"{option} is empty: list dates as YYYY-MM-DD, or omit the option to use all days")
    return [_date(option, text) for text in written]


def _lines(option: str, path: Path) -> list[str]:
    try:
        lines = read_text(path).splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{option} is {path}, which cannot be read ({error}): give a text file with one date per line, or a list "
            "[2019-01-31]"
        ) from error
    return [line.strip() for line in lines if line.strip()]


def _date(option: str, text: str) -> str:
    try:
        return Date.fromisoformat(text).isoformat()
    except ValueError as error:
        raise ValueError(f"{option} contains {text!r}, which is not a date: write YYYY-MM-DD") from error
