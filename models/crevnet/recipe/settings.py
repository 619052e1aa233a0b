"""What a recipe is set up with, kept as recipe.yaml in its folder."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from crevnet.machine.errors import SettingsError
from crevnet.settings import (
    RunSettings,
    TrainingSettings,
    add_sections,
    default_model,
    model_named_in,
)
from crevnet.training.recipe_folders import settings_file

if TYPE_CHECKING:
    from crevnet.parser import Parser


@dataclass(frozen=True)
class FineTuning:
    """How a trained model is trained further; whatever is not here is as for the base model.

    Args:
        epochs: passes over the data, or over `batches` of it.
        batches: training batches in an epoch; all of them if not given.
        learning_rate: Adam's.
        max_minutes: stop after so many minutes of training.
    """

    epochs: int = 10
    batches: int | None = None
    learning_rate: float = 2e-5
    max_minutes: float | None = None

    def __post_init__(self) -> None:
        self.of(TrainingSettings())  # says what is wrong with a value

    def of(self, training: TrainingSettings) -> TrainingSettings:
        return replace(training, **asdict(self))


@dataclass(frozen=True)
class RecipeSettings:
    """Of the base model and of both fine-tunings; kept as recipe.yaml."""

    base: RunSettings = field(default_factory=RunSettings)
    city: FineTuning = field(default_factory=FineTuning)
    frame: FineTuning = field(default_factory=FineTuning)

    def sections(self) -> dict[str, Any]:
        return {**asdict(self.base), "city": asdict(self.city), "frame": asdict(self.frame)}


def add_recipe(parser: Parser, defaults: RecipeSettings) -> None:
    """Options for every value of a recipe's settings."""
    add_sections(parser, defaults.base)
    for name in ("city", "frame"):
        parser.add_class_arguments(FineTuning, name, default=asdict(getattr(defaults, name)))


def load_recipe(folder: Path) -> RecipeSettings:
    """The recipe.yaml of a recipe's folder. Raises SettingsError where it is wrong."""
    return read_recipe(settings_file(folder))


def read_recipe(path: Path) -> RecipeSettings:
    """A recipe's configuration file. Raises SettingsError where it is wrong."""
    from crevnet.parser import Parser

    parser = Parser(prog="crevnet")
    try:
        add_recipe(parser, RecipeSettings(RunSettings(default_model(model_named_in(path)))))
        found = parser.instantiate(parser.parse_path(str(path)))
        return RecipeSettings(RunSettings(found.model, found.data, found.training), found.city, found.frame)
    except (SettingsError, OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise SettingsError(f"{path}: {' '.join(str(error).split())}") from error


def refuse_what_is_no_base(base: RunSettings) -> None:
    """SettingsError where a recipe cannot begin with a run of these settings."""
    if base.data.protocol == "movies":
        raise SettingsError("data.protocol movies has no cities, and a recipe tunes on each: train by crevnet fit")
    if isinstance(base.training.loss, int):
        raise SettingsError(
            f"training.loss {base.training.loss} is of one frame, and a recipe comes to each of them itself: say "
            "--training.loss all"
        )


def refuse_changes(path: Path, begun: RecipeSettings, now: RecipeSettings) -> None:
    """SettingsError where a recipe that was begun is to go on with other settings."""
    before, after = begun.sections(), now.sections()
    for section, values in before.items():
        for name, value in values.items():
            if after[section].get(name) != value:
                raise SettingsError(
                    f"{path} was begun with {section}.{name} {value}, now it is {after[section].get(name)}: leave the option out "
                    f"to go on, or choose another --out"
                )
