"""Mirror images of windows, with all directions (headings, connectivity) mirrored accordingly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from crevnet.data.files.layouts import Layout
from crevnet.data.maps.static import DIRECTIONS
from crevnet.data.settings import Flips
from crevnet.data.windows import Windows
from crevnet.networks.config import STATIC_CHANNELS, Static


@dataclass(frozen=True)
class Flip:
    """A mirror image: `horizontal` swaps east and west, `vertical` north and south. Rows run southwards, columns eastwards."""

    horizontal: bool = False
    vertical: bool = False

    def image(self, image: Tensor) -> Tensor:
        """`image` (..., H, W), mirrored."""
        return torch.flip(image, [dim for dim, mirrored in ((-1, self.horizontal), (-2, self.vertical)) if mirrored])

    def direction(self, name: str) -> str:
        """A compass direction, mirrored: SE becomes SW in a horizontal flip."""
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
"""The images of a window for each setting, drawn equally often; both flips together rotate by 180 degrees."""


class FlippedWindows(Dataset[dict[str, Any]]):
    """Windows under several flips: item `n * len(windows) + i` is window `i` under flip `n`.

    Args:
        windows: the windows to mirror.
        flips: the flips, in the order of the items.
        layout: determines which values and channels are headings.
        names: names of the windows' static inputs, in order.
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
