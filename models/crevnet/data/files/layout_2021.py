"""The days of Traffic4cast 2021."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from crevnet.data.files.competition_folders import CompetitionFolders
from crevnet.data.files.protocol import HeadingOrder, headings, protocol


class Traffic4cast2021(CompetitionFolders):
    """(288, 495, 436, 8) per day: volume and mean speed for each of four headings; slots in local time."""

    files = "<root>/<CITY>/{split}/YYYY-MM-DD_<CITY>_8ch.h5"
    _name = re.compile(r"\d{4}-\d{2}-\d{2}_.+_8ch\.h5")
    _split = "{split}"

    def __init__(self, heading_order: HeadingOrder) -> None:
        self.protocol = protocol("2021", heading_order)
        self._headings = headings(heading_order)

    def static_file(self, root: Path, city: str) -> Path:
        return root / city / f"{city}_static.h5"

    def turn_headings(self, frames: Tensor, turned: Callable[[str], str]) -> Tensor:
        pairs = {turned(heading): frames[:, 2 * n : 2 * n + 2] for n, heading in enumerate(self._headings)}
        return torch.cat([*(pairs[heading] for heading in self._headings), frames[:, 8:]], dim=1)


def layout(heading_order: HeadingOrder) -> Traffic4cast2021:
    return Traffic4cast2021(heading_order)
