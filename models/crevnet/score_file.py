"""The file that --json names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crevnet.files import replace_file
from crevnet.parser import SettingsError


def check_score_file(path: Path | None) -> None:
    """Refuse, before the scoring, what could not be written after it. Raises SettingsError."""
    if path is None:
        return
    if path.is_dir():
        raise SettingsError(f"--json {path} is a folder: name a file in it, {path / 'scores.json'} say")
    if not path.parent.is_dir():
        raise SettingsError(f"--json {path}: there is no folder {path.parent}: make it, or name another one")


def write_score_file(path: Path | None, scores: Mapping[str, Any]) -> None:
    if path is not None:
        replace_file(path, lambda file: file.write(f"{json.dumps(scores, indent=2)}\n".encode()))
