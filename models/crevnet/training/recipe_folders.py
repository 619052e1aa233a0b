"""Paths of a recipe's settings and runs."""

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
    """The table of scores that a recipe writes at the end."""
    return folder / "scores.yaml"


def base_run(folder: Path) -> Path:
    return folder / "base"


def city_run(folder: Path, city: str) -> Path:
    return folder / "city" / city


def frame_run(folder: Path, city: str, number: int) -> Path:
    return folder / "frame" / city / str(number)


def recipe_of(run: Path) -> Path | None:
    """The recipe that contains this run, if any."""
    above = (run.parent, run.parent.parent, run.parent.parent.parent)
    return next((folder for folder in above if is_recipe(folder)), None)


def begun_runs(folder: Path) -> list[Path]:
    """The recipe's runs that have started, in training order."""
    return [
        run for run in (base_run(folder), *_found(folder / "city", 1), *_found(folder / "frame", 2)) if run.is_dir()
    ]


def record(run: Path) -> Path:
    """The file that marks a run of the recipe as finished."""
    return run / "finished.yaml"


def score_of(run: Path) -> float | None:
    """The best validation score of a finished run; None before. SettingsError if the file has no score."""
    path = record(run)
    if not path.is_file():
        return None
    try:
        return float(load_yaml(path)["score"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise SettingsError(f"{path} has no score ({reason}): remove it to continue the run") from error


def _found(folder: Path, depth: int) -> list[Path]:
    """Folders exactly `depth` levels below `folder`, sorted by name, with numbers sorted by value."""
    found = folder.glob("/".join("*" * depth))
    return sorted(found, key=lambda path: (path.parent.name, path.name.isdigit() and int(path.name), path.name))
