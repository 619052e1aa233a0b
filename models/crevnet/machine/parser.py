"""jsonargparse's parser, with one line for each error of the command line or a configuration file."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import yaml

from crevnet.machine.errors import SettingsError
from crevnet.machine.files import read_text
from crevnet.machine.yaml_text import check_yaml

_UNION = re.compile(r"Does not validate against any of the Union subtypes Subtypes: \[(.*)\] Errors: .* Given value: ")
_CHOICE = re.compile(r"a typing\.Literal\[(.*?)\]")
_WORDS = re.compile(r"typing\.Literal\[(.*?)\]")
_CLASS = re.compile(r"(?:a )?<class '(?:\w+\.)*(\w+)'>")
_UNKNOWN = re.compile(r"(?:unrecognized arguments: (--)|there is no option )([\w.-]+)")


_FROM_FILES = ("--config", "--model", "--data", "--training", "--city", "--frame")
"""Options whose value may be a file of values."""

_load_yaml = jsonargparse.get_loader("yaml")


def _load_checked(text: str) -> Any:
    check_yaml(text)
    values = _load_yaml(text)
    _refuse_pipes(values)
    return values


def _refuse_pipes(values: Any) -> None:
    """Refuse a pipe or a device in the place of a section, because reading it would never end."""
    for name, value in values.items() if isinstance(values, dict) else ():
        if f"--{name}" in _FROM_FILES and isinstance(value, str) and os.path.exists(value):
            try:
                read_text(Path(value))
            except (OSError, ValueError) as error:
                raise yaml.YAMLError(f"{name}: {value} cannot be read ({error})") from error
        _refuse_pipes(value)


jsonargparse.set_loader("yaml", _load_checked, (yaml.YAMLError,))  # it loads all text, of files and of options


class Parser(jsonargparse.ArgumentParser):
    """Raises SettingsError where argparse would print its usage and exit. Abbreviations are refused."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def validate(self, namespace: jsonargparse.Namespace, *arguments: Any, **options: Any) -> None:
        """Also refuse a section without values, and null for a required value, which the base class accepts from files."""
        for section in self.groups or ():
            values = namespace.get(section)
            if values is not None and not isinstance(values, jsonargparse.Namespace):
                raise TypeError(f"{section} is {values!r}, expected a section with values")
        for action in self._actions:  # a missing value is null, too
            required = action.required if action.option_strings else action.nargs in (None, "+")
            if required and namespace.get(action.dest) is None:
                self.error(f"{action.option_strings[0] if action.option_strings else action.dest.upper()} is missing")
        try:
            super().validate(namespace, *arguments, **options | {"skip_unset": False})
        except KeyError as error:
            name = self._unknown(namespace)
            if name is None:
                raise
            self.error(f"there is no option {name}", error)

    def refuse_pipes(self, arguments: Sequence[str]) -> None:
        """Refuse pipes and devices in the place of files of values, because reading them would never end."""
        for option, value in zip(["", *arguments], [*arguments, ""], strict=True):
            name, _, joined = value.partition("=")
            given = joined if name in _FROM_FILES else value if option in _FROM_FILES else ""
            if given and os.path.exists(given):
                try:
                    read_text(Path(given))
                except (OSError, ValueError) as error:
                    self.error(f"{given} cannot be read ({error})")

    def parse_path(self, path: str, *arguments: Any, **options: Any) -> Any:
        read_text(Path(path))  # ValueError if it is not a short text
        return super().parse_path(path, *arguments, **options)

    def _unknown(self, namespace: jsonargparse.Namespace) -> str | None:
        """The first value that belongs to no option."""
        known = {action.dest for action in self._actions}
        return next((name for name in vars(namespace.as_flat()) if name not in known), None)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        shortened = _shortened(" ".join(message.split()))
        raise SettingsError(f"{shortened}{self._nearest(message)} (see {self.prog} --help)") from ex

    def _nearest(self, message: str) -> str:
        """A suggestion for an option that does not exist, if one has a similar name."""
        unknown = _UNKNOWN.match(message)
        if unknown is None:
            return ""
        dashes, name = unknown.groups(default="")
        options = [option.removeprefix("--") for action in self._actions for option in action.option_strings]
        return "".join(f"; did you mean {dashes}{near}?" for near in get_close_matches(name, options, 1, cutoff=0.8))


def _shortened(message: str) -> str:
    """jsonargparse's message with the accepted values, instead of Python's types and the fault that each of them finds."""
    message = _UNION.sub(r"Expected one of \1. Got value: ", message)
    message = _WORDS.sub(r"\1", _CHOICE.sub(r"one of \1", message))
    message = message.replace('in "<unicode string>", ', "in ").removeprefix('Parser key "config": ')
    return _CLASS.sub(r"\1", message).replace("NoneType", "null")
