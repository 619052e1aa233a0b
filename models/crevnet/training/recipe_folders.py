"""Where a recipe keeps its settings and its runs."""

from __future__ import annotations

from pathlib import Path

import yaml

from crevnet.machine.errors import SettingsError
from crevnet.machine.yaml_text import load_yaml


def is_recipe(folder: Path) -> bool:
    return settings_file(folder).is_file()


def settings_file(folder: Path) -> Path:
    return folder / "recipe.yaml"


def scores_file(folder: Path) -> Path:
    """The table that a recipe ends with."""
    return folder / "scores.yaml"


def base_run(folder: Path) -> Path:
    return folder / "base"


def city_run(folder: Path, city: str) -> Path:
    return folder / "city" / city


def frame_run(folder: Path, city: str, number: int) -> Path:
    return folder / "frame" / city / str(number)


def recipe_of(run: Path) -> Path | None:
    """The recipe whose run it is, if any."""
    above = (run.parent, run.parent.parent, run.parent.parent.parent)
    return next((folder for folder in above if is_recipe(folder)), None)


def begun_runs(folder: Path) -> list[Path]:
    """Those that have been begun, in the order in which they are trained."""
    return [
        run for run in (base_run(folder), *_found(folder / "city", 1), *_found(folder / "frame", 2)) if run.is_dir()
    ]


def record(run: Path) -> Path:
    """What is written when a run of the recipe is done."""
    return run / "finished.yaml"


def score_of(run: Path) -> float | None:
    """The best validation score, once the run is done."""
    path = record(run)
    if not path.is_file():
        return None
    try:
        return float(load_yaml(path)["score"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise SettingsError(f"{path} holds no score ({reason}): remove it, and the run goes on") from error


def _found(folder: Path, depth: int) -> list[Path]:
    """Folders so many levels below another, in the order of their names, numbers by their values."""
    found = folder.glob("/".join("*" * depth))
    return sorted(found, key=lambda path: (path.parent.name, path.name.isdigit() and int(path.name), path.name))
