"""The tasks of the Traffic4cast competitions of 2019 and 2021."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ProtocolName = Literal["2019", "2021"]
LayoutName = Literal["2019", "2021", "movies"]
"""Every layout, by the name of its file `layout_NAME.py`. The last one holds any file."""
HeadingOrder = Literal["ne-se-sw-nw", "ne-nw-se-sw"]

_ISTANBUL_TEST_SLOTS = (57, 114, 174, 222, 258)
#: First predicted slots of a test day in the competition of 2019; the 12 slots before each are given.
TEST_SLOTS = {"Berlin": (30, 69, 126, 186, 234), "Istanbul": _ISTANBUL_TEST_SLOTS, "Moscow": _ISTANBUL_TEST_SLOTS}


@dataclass(frozen=True)
class Protocol:
    """One competition.

    Attributes:
        name: its year.
        channels: the quantity in each channel of a frame.
        past: number of given frames.
        horizons: the following frames to predict; 1 is the next frame, five minutes later.
    """

    name: ProtocolName
    channels: tuple[str, ...]
    past: int
    horizons: tuple[int, ...]

    @property
    def horizon(self) -> int:
        """Number of frames that a model must predict to reach the last scored frame."""
        return max(self.horizons)


def protocol(name: ProtocolName, heading_order: HeadingOrder = "ne-se-sw-nw") -> Protocol:
    """The competition of that year.

    Args:
        name: the year.
        heading_order: order of the four pairs of volume and speed in 2021. The organizers' own files disagree: their code of
            December 2021 has ne-se-sw-nw, their readme of September 2022 ne-nw-se-sw.
    """
    if name == "2019":
        return Protocol("2019", ("volume", "speed", "heading"), 12, (1, 2, 3))
    channels = tuple(f"{what} {heading}" for heading in headings(heading_order) for what in ("volume", "speed"))
    return Protocol("2021", channels, 12, (1, 2, 3, 6, 9, 12))


def headings(order: HeadingOrder) -> list[str]:
    """NE, SE, SW and NW in that order."""
    return order.upper().split("-")
