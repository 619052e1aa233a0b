"""The settings of a recipe, stored as recipe.yaml in its folder."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from crevnet.machine.errors import SettingsError
from crevnet.training.recipe_folders import settings_file
from crevnet.training.settings import RunSettings, TrainingSettings, add_sections, default_model, model_named_in

if TYPE_CHECKING:
    from crevnet.machine.parser import Parser


@dataclass(frozen=True)
class FineTuning:
    """Fine-tuning. All other settings are those of the base model.

    Args:
        epochs: number of epochs. An epoch is one pass over the data, or over `batches` of it.
        batches: number of training batches per epoch, by default all.
        learning_rate: Adam learning rate.
        max_minutes: maximum training time in minutes.
    """

    epochs: int = 10
    batches: int | None = None
    learning_rate: float = 2e-5
    max_minutes: float | None = None

    def __post_init__(self) -> None:
        self.of(TrainingSettings())  # raises for a wrong value

    def of(self, training: TrainingSettings) -> TrainingSettings:
        return replace(training, **asdict(self))


@dataclass(frozen=True)
class RecipeSettings:
    """The settings of the base model and of both fine-tunings."""

    base: RunSettings = field(default_factory=RunSettings)
    city: FineTuning = field(default_factory=FineTuning)
    frame: FineTuning = field(default_factory=FineTuning)

    def sections(self) -> dict[str, Any]:
        return {**asdict(self.base), "city": asdict(self.city), "frame": asdict(self.frame)}


def add_recipe(parser: Parser, defaults: RecipeSettings) -> None:
    """Add an option for every setting of a recipe."""
    add_sections(parser, defaults.base)
    for name in ("city", "frame"):
        parser.add_class_arguments(FineTuning, name, default=asdict(getattr(defaults, name)))


def load_recipe(folder: Path) -> RecipeSettings:
    """The recipe.yaml of a recipe's folder. Raises SettingsError if it is wrong."""
    return read_recipe(settings_file(folder))


def read_recipe(path: Path) -> RecipeSettings:
    """A recipe's configuration file. Raises SettingsError if it is wrong."""
    from crevnet.machine.parser import Parser  # imports jsonargparse, which training itself does not need

    parser = Parser(prog="crevnet")
    try:
        add_recipe(parser, RecipeSettings(RunSettings(default_model(model_named_in(path)))))
        found = parser.instantiate(parser.parse_path(str(path)))
        return RecipeSettings(RunSettings(found.model, found.data, found.training), found.city, found.frame)
    except (SettingsError, OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise SettingsError(f"{path}: {' '.join(str(error).split())}") from error


def refuse_what_is_no_base(base: RunSettings) -> None:
    """Raise SettingsError if a recipe cannot start with a run of these settings."""
    if base.data.protocol == "movies":
        raise SettingsError(
            "data.protocol movies has no cities, and a recipe fine-tunes on each: train with crevnet fit"
        )
    if isinstance(base.training.loss, int):
        raise SettingsError(
            f"training.loss {base.training.loss} covers one frame, and a recipe fine-tunes on each frame itself: use "
            "--training.loss all"
        )


def refuse_changes(path: Path, begun: RecipeSettings, now: RecipeSettings) -> None:
    """Raise SettingsError if a recipe would continue with other settings."""
    before, after = begun.sections(), now.sections()
    for section, values in before.items():
        for name, value in values.items():
            if after[section].get(name) != value:
                raise SettingsError(
                    f"{path} was begun with {section}.{name} {value}, now it is {after[section].get(name)}: omit the option "
                    f"to continue, or choose another --out"
                )
