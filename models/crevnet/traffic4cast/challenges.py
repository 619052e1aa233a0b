"""The challenge that the settings choose."""

from __future__ import annotations

from crevnet.data.settings import DataSettings
from crevnet.machine.errors import SettingsError
from crevnet.traffic4cast.challenge2019 import Challenge2019
from crevnet.traffic4cast.challenge2021 import Challenge2021
from crevnet.traffic4cast.interface import Challenge
from crevnet.traffic4cast.settings import ChallengeSettings


def challenge(data: DataSettings, settings: ChallengeSettings) -> Challenge:
    """The challenge of the competition in `data.protocol`. Raises SettingsError for videos."""
    if data.protocol == "movies":
        raise SettingsError("--data.protocol movies is not a competition: use 2019 or 2021")
    if data.protocol == "2019":
        return Challenge2019(settings.slots)
    return Challenge2021(settings.task, data.heading_order)
