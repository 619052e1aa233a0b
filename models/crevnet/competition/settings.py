"""Which competition, as the command line says it."""

from __future__ import annotations

from dataclasses import dataclass

from crevnet.competition.interface import Competition
from crevnet.competition.traffic4cast2019 import Traffic4cast2019
from crevnet.competition.traffic4cast2021 import Task, Traffic4cast2021
from crevnet.data.protocol import HeadingOrder, ProtocolName


@dataclass(frozen=True)
class CompetitionSettings:
    """Which competition.

    Args:
        protocol: its year.
        task: which of 2021's.
        heading_order: of 2021's channels, which only names them.
        slots: in 2019, the first predicted slots of a test day in cities other than Berlin, Istanbul and Moscow.
    """

    protocol: ProtocolName = "2019"
    task: Task = "temporal"
    heading_order: HeadingOrder = "ne-se-sw-nw"
    slots: list[int] | None = None


def competition(settings: CompetitionSettings) -> Competition:
    if settings.protocol == "2019":
        return Traffic4cast2019(settings.slots)
    return Traffic4cast2021(settings.task, settings.heading_order)
