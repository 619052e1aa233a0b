"""The wording of messages."""

from __future__ import annotations

from collections.abc import Sequence


def listed(words: Sequence[str], conjunction: str) -> str:
    """Words as a list in a sentence: a, b and c."""
    *others, last = words
    return f"{', '.join(others)} {conjunction} {last}" if others else last
