"""Which challenge, as the command line says it."""

from __future__ import annotations

from dataclasses import dataclass

from crevnet.machine.errors import SettingsError
from crevnet.settings import DataSettings
from crevnet.traffic4cast.challenge2019 import Challenge2019
from crevnet.traffic4cast.challenge2021 import Challenge2021, Task
from crevnet.traffic4cast.interface import Challenge


@dataclass(frozen=True)
class ChallengeSettings:
    """What a challenge needs to know beside the data's settings.

    Args:
        task: which of 2021's.
        slots: in 2019, the first predicted slots of a test day in cities other than Berlin, Istanbul and Moscow.
    """

    task: Task = "temporal"
    slots: list[int] | None = None


def challenge(data: DataSettings, settings: ChallengeSettings) -> Challenge:
    """The challenge of the year that `data.protocol` names."""
    if data.protocol == "movies":
        raise SettingsError("--data.protocol movies is no competition: say 2019 or 2021")
    if data.protocol == "2019":
        return Challenge2019(settings.slots)
    return Challenge2021(settings.task, data.heading_order)
