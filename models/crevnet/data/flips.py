"""Mirror images of windows, in which whatever has a direction is mirrored, too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from crevnet.data.files.layouts import Layout
from crevnet.data.maps.static import DIRECTIONS
from crevnet.data.windows import Windows
from crevnet.networks.config import STATIC_CHANNELS, Static

Flips = Literal["none", "horizontal", "vertical", "both"]


@dataclass(frozen=True)
class Flip:
    """A mirror image: horizontal, east for west; vertical, north for south. Rows are counted southwards, columns eastwards."""

    horizontal: bool = False
    vertical: bool = False

    def image(self, image: Tensor) -> Tensor:
        """(..., H, W), mirrored."""
        return torch.flip(image, [dim for dim, mirrored in ((-1, self.horizontal), (-2, self.vertical)) if mirrored])

    def direction(self, name: str) -> str:
        """A point of the compass, mirrored: SE is SW after a horizontal flip."""
        swapped = {"E": "W", "W": "E"} if self.horizontal else {}
        return name.translate(str.maketrans(swapped | ({"N": "S", "S": "N"} if self.vertical else {})))

    def static(self, channels: Tensor, names: Sequence[Static]) -> Tensor:
        """Static channels (S, H, W) of these names, mirrored."""
        parts = dict(zip(names, channels.split([STATIC_CHANNELS[name] for name in names]), strict=True))
        if "connectivity" in parts:
            came_from = [DIRECTIONS.index(self.direction(name)) for name in DIRECTIONS]
            parts["connectivity"] = parts["connectivity"][came_from]
        return self.image(torch.cat(list(parts.values()))) if parts else channels


FLIPS: dict[Flips, tuple[Flip, ...]] = {
    "none": (Flip(),),
    "horizontal": (Flip(), Flip(horizontal=True)),
    "vertical": (Flip(), Flip(vertical=True)),
    "both": (Flip(), Flip(horizontal=True), Flip(vertical=True), Flip(horizontal=True, vertical=True)),
}
"""What a window may be turned into, all of them equally often; a turn by 180 degrees is both flips."""


class FlippedWindows(Dataset[dict[str, Any]]):
    """Windows under each of some flips: item `n * len(windows) + i` is window `i` under flip `n`.

    Args:
        windows: what is mirrored.
        flips: how, in the order of the items.
        layout: says which values and channels have headings.
        names: of the windows' static channels.
    """

    def __init__(self, windows: Windows, flips: Sequence[Flip], layout: Layout, names: Sequence[Static]) -> None:
        self._windows, self._flips, self._layout, self._names = windows, tuple(flips), layout, tuple(names)

    def __len__(self) -> int:
        return len(self._flips) * len(self._windows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, window = divmod(range(len(self))[index], len(self._windows))
        flip, item = self._flips[number], self._windows[window]
        if flip == Flip():
            return item
        frames = self._layout.turn_headings(flip.image(item["frames"]), flip.direction)
        mirrored = {"frames": frames, "road_map": flip.image(item["road_map"])}
        return item | mirrored | {"static": flip.static(item["static"], self._names)}
