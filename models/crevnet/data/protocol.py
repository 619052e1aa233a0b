"""What the competitions of 2019 and 2021 ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ProtocolName = Literal["2019", "2021"]
HeadingOrder = Literal["ne-se-sw-nw", "ne-nw-se-sw"]


@dataclass(frozen=True)
class Protocol:
    """One competition.

    Attributes:
        name: its year.
        channels: what each channel of a frame holds.
        past: frames that are given.
        horizons: which of the following frames are to be predicted; 1 is the next one, five minutes later.
    """

    name: ProtocolName
    channels: tuple[str, ...]
    past: int
    horizons: tuple[int, ...]

    @property
    def horizon(self) -> int:
        """Frames that a model has to predict, up to the last one that is asked for."""
        return max(self.horizons)


def protocol(name: ProtocolName, heading_order: HeadingOrder = "ne-se-sw-nw") -> Protocol:
    """The competition of that year.

    heading_order: of the four pairs of volume and speed in 2021. The organisers' own files disagree: their code of December
        2021 has ne-se-sw-nw, their readme of September 2022 ne-nw-se-sw.
    """
    if name == "2019":
        return Protocol("2019", ("volume", "speed", "heading"), 12, (1, 2, 3))
    channels = tuple(
        f"{what} {heading.upper()}" for heading in heading_order.split("-") for what in ("volume", "speed")
    )
    return Protocol("2021", channels, 12, (1, 2, 3, 6, 9, 12))
