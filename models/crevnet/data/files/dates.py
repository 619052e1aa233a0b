"""Lists of dates: which days a split takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date as Date
from pathlib import Path

from crevnet.machine.files import read_text


@dataclass(frozen=True)
class DateChoice:
    """The dates, YYYYMMDD, that a split takes: those of a list; without one, all that another split's list leaves."""

    option: str
    """Where the list stands, or would stand."""
    listed: Sequence[str] | None = None
    taken: Sequence[str] | None = None

    def takes(self, date: str) -> bool:
        known = {written.replace("-", "") for written in self.listed or self.taken or ()}
        return (date in known) == (self.listed is not None)


def read_dates(option: str, given: Sequence[str] | Path | None) -> list[str] | None:
    """Dates as YYYY-MM-DD, from a list of them or from a text file of one date a line; None stays None.

    Raises ValueError, which names `option`, for what is no date, a file that cannot be read, and no dates at all.
    """
    if given is None:
        return None
    written = _lines(option, given) if isinstance(given, Path) else list(given)
    if not written:
        raise ValueError(f"{option} names no date: name some, YYYY-MM-DD, or leave it out for all days")
    return [_date(option, text) for text in written]


def _lines(option: str, path: Path) -> list[str]:
    try:
        lines = read_text(path).splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{option} is {path}, which cannot be read ({error}): give a text file of one date a line, or a list [2019-01-31]"
        ) from error
    return [line.strip() for line in lines if line.strip()]


def _date(option: str, text: str) -> str:
    try:
        return Date.fromisoformat(text).isoformat()
    except ValueError as error:
        raise ValueError(f"{option} holds {text!r}, which is no date: write YYYY-MM-DD") from error
