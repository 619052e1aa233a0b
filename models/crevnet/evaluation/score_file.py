"""The file that --json names."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crevnet.machine.errors import SettingsError
from crevnet.machine.files import replace_file


def check_score_file(path: Path | None) -> None:
    """Refuse, before the scoring, what could not be written after it. Raises SettingsError."""
    if path is None:
        return
    if path.is_dir():
        raise SettingsError(f"--json {path} is a folder: name a file in it, {path / 'scores.json'} say")
    if not path.parent.is_dir():
        raise SettingsError(f"--json {path}: there is no folder {path.parent}: make it, or name another one")


def write_score_file(path: Path | None, scores: Mapping[str, Any]) -> None:
    """Null is what is no number: SSIM of frames that are too small for it."""
    if path is not None:
        text = json.dumps(_in_json(scores), indent=2, allow_nan=False)
        replace_file(path, lambda file: file.write(f"{text}\n".encode()))


def _in_json(value: Any) -> Any:
    """JSON knows finite numbers alone."""
    if isinstance(value, Mapping):
        return {name: _in_json(v) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_in_json(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
