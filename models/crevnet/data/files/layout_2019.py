"""The days of Traffic4cast 2019."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from crevnet.data.files.competition_folders import CompetitionFolders
from crevnet.data.files.protocol import HeadingOrder, protocol


class Traffic4cast2019(CompetitionFolders):
    """(288, 495, 436, 3) per day: five-minute slots in UTC, pixels of 100 m; volume, mean speed and majority heading."""

    files = "<root>/<City>/<City>_{split}/YYYYMMDD_100m_bins.h5"
    protocol = protocol("2019")
    _name = re.compile(r"\d{8}_100m_bins\.h5")
    _split = "{city}_{split}"
    _heading_codes: ClassVar[dict[str, int]] = {"NW": 1, "NE": 85, "SW": 170, "SE": 255}

    def turn_headings(self, frames: Tensor, turned: Callable[[str], str]) -> Tensor:
        values = torch.arange(256)
        for heading, code in self._heading_codes.items():
            values[code] = self._heading_codes[turned(heading)]
        mirrored = (values.to(frames.dtype) / 255)[(frames[:, 2:3] * 255).round().long()]
        return torch.cat([frames[:, :2], mirrored, frames[:, 3:]], dim=1)


TRAFFIC4CAST_2019 = Traffic4cast2019()
"""The default layout."""


def layout(heading_order: HeadingOrder) -> Traffic4cast2019:
    return TRAFFIC4CAST_2019
