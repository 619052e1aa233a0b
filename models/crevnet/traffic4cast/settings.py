"""The settings of a challenge that are not those of its data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Task = Literal["temporal", "spatiotemporal"]


@dataclass(frozen=True)
class ChallengeSettings:
    """Which challenge of a competition.

    Args:
        task: challenge of 2021.
        slots: first predicted time slots of a test day in cities other than Berlin, Istanbul and Moscow (2019).
    """

    task: Task = "temporal"
    slots: list[int] | None = None
