"""The options' values where the command line has none. They depend on options that have to be found before it is parsed."""

from __future__ import annotations

from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any

from crevnet.machine.errors import SettingsError
from crevnet.networks.config import PRESETS
from crevnet.recipe.settings import RecipeSettings, load_recipe
from crevnet.settings import RunSettings, default_model, load_settings, start_named_in, with_protocol
from crevnet.training.recipe_folders import base_run, is_recipe

_HOW_TO_READ = ("stride", "flips", "batch_size", "workers")
"""Data settings that make no difference to which frames are evaluated."""

_VALIDATED = ("validation_slots", "validation_windows", "validation_stride")
"""Nor have these any meaning for a submission."""


def fit_defaults(arguments: list[str]) -> RunSettings:
    """The defaults of fit's options: those of the run to resume, else of the model, the preset and the protocol that the command
    line names, or its configuration file."""
    run = value_of("--resume", arguments)
    if run is not None:
        for option in ("--out", "--preset", "--protocol", "--training.start"):
            if value_of(option, arguments) is not None:
                raise SettingsError(f"{option} is for new runs, and {run} has begun: leave it out with --resume")
        return load_settings(Path(run))
    config = value_of("--config", arguments)
    file = {} if config is None else start_named_in(Path(config))
    name = value_of("--model.name", arguments) or file.get("model.name", "crevnet")
    preset = value_of("--preset", arguments)
    if name != "crevnet" and preset is not None:
        raise SettingsError(f"--preset {preset} is a size of crevnet: leave it out with --model {name}")
    size = PRESETS.get(preset or file.get("preset", ""), PRESETS["paper"])
    model = size if name == "crevnet" else default_model(name)
    return with_protocol(RunSettings(model), value_of("--protocol", arguments) or file.get("protocol"))


def recipe_defaults(arguments: list[str]) -> RecipeSettings:
    """The defaults of a recipe's options: those of the one that was begun in its folder, else as fit's."""
    out = value_of("--out", arguments)
    if arguments[:1] == ["recipe"] and out is not None and is_recipe(Path(out)):
        return load_recipe(Path(out))
    return RecipeSettings(fit_defaults(arguments))


def value_of(option: str, arguments: list[str]) -> str | None:
    """What the command line says of an option that has to be known before the others can be parsed."""
    for argument, following in zip_longest(arguments, arguments[1:]):
        if argument == option:
            return following
        if argument.startswith(f"{option}="):
            return argument.partition("=")[2]
    return None


def data_of_runs(arguments: list[str]) -> dict[str, Any] | None:
    """The data settings of the runs that the command line names: the defaults of its data options. Raises SettingsError where
    the runs have been given different data, and the command line does not say which to take."""
    if arguments[:1] not in (["evaluate"], ["predict"], ["figures"], ["submit"]):
        return None
    folders = [Path(argument) for argument in arguments[1:]]
    runs = [base_run(folder) if is_recipe(folder) else folder for folder in folders]
    settings = {run: asdict(load_settings(run).data) for run in runs if (run / "config.yaml").is_file()}
    if not settings:
        return None
    indifferent = _HOW_TO_READ + (_VALIDATED if arguments[0] == "submit" else ())
    (first, data), *others = settings.items()
    for run, other in others:
        for name, value in data.items():
            given = value_of(f"--data.{name}", arguments) is not None
            if other[name] != value and name not in indifferent and not given:
                raise SettingsError(
                    f"{first} and {run} have different data, data.{name} is {value} and {other[name]}: say --data.{name}"
                )
    return data
