"""Where a recipe keeps its settings and its runs."""

from __future__ import annotations

from pathlib import Path


def is_recipe(folder: Path) -> bool:
    return settings_file(folder).is_file()


def settings_file(folder: Path) -> Path:
    return folder / "recipe.yaml"


def base_run(folder: Path) -> Path:
    return folder / "base"


def city_run(folder: Path, city: str) -> Path:
    return folder / "city" / city


def frame_run(folder: Path, city: str, number: int) -> Path:
    return folder / "frame" / city / str(number)


def record(run: Path) -> Path:
    """What is written when a run of the recipe is done."""
    return run / "finished.yaml"
