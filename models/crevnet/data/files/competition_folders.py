"""The folders of both Traffic4cast competitions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar

from crevnet.data.files.layouts import Layout
from crevnet.data.files.protocol import Protocol


class CompetitionFolders(Layout):
    """Folders of a competition: one per city, which contains one per split."""

    protocol: Protocol
    _name: ClassVar[re.Pattern[str]]
    _split: ClassVar[str]

    def find(self, root: Path, split: str) -> dict[str, list[Path]]:
        found = {}
        for folder in sorted(root.iterdir()):
            split_folder = folder / self._split.format(city=folder.name, split=split)
            if split_folder.is_dir():
                paths = sorted(filter(self.holds, split_folder.iterdir()))
                if paths:
                    found[folder.name] = paths
        return found

    def holds(self, path: Path) -> bool:
        return self._name.fullmatch(path.name) is not None

    def date(self, path: Path) -> str:
        return path.name.partition("_")[0].replace("-", "")

    def horizons(self, horizon: int) -> tuple[int, ...]:
        return self.protocol.horizons if horizon == self.protocol.horizon else super().horizons(horizon)

    def channel_name(self, channel: int) -> str:
        names = self.protocol.channels
        return names[channel] if channel < len(names) else super().channel_name(channel)
