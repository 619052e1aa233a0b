"""The file of scores that --json writes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crevnet.machine.errors import SettingsError
from crevnet.machine.files import replace_file


def check_score_file(path: Path | None) -> None:
    """Raise SettingsError, before scoring, if the file could not be written after it."""
    if path is None:
        return
    if path.is_dir():
        raise SettingsError(
            f"--json {path} is a folder, expected a file: name a file in it, such as {path / 'scores.json'}"
        )
    if not path.parent.is_dir():
        raise SettingsError(f"--json {path}: the folder {path.parent} does not exist: create it, or name another one")


def write_score_file(path: Path | None, scores: Mapping[str, Any]) -> None:
    """Write scores as JSON. Values that are not finite become null, such as the SSIM of frames that are too small."""
    if path is not None:
        text = json.dumps(_in_json(scores), indent=2, allow_nan=False)
        replace_file(path, lambda file: file.write(f"{text}\n".encode()))


def _in_json(value: Any) -> Any:
    """A value in the types of JSON, which has only finite numbers."""
    if isinstance(value, Mapping):
        return {name: _in_json(v) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_in_json(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
