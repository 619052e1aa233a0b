"""jsonargparse's parser, which says in one line what is wrong with the command line or a configuration file."""

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
    """Refuse a pipe or a device that stands for a section: the file would be read for ever."""
    for name, value in values.items() if isinstance(values, dict) else ():
        if f"--{name}" in _FROM_FILES and isinstance(value, str) and os.path.exists(value):
            try:
                read_text(Path(value))
            except (OSError, ValueError) as error:
                raise yaml.YAMLError(f"{name}: {value} cannot be read ({error})") from error
        _refuse_pipes(value)


jsonargparse.set_loader("yaml", _load_checked, (yaml.YAMLError,))  # all text comes through it, of files and of options


class Parser(jsonargparse.ArgumentParser):
    """Raises SettingsError where argparse would print its usage and exit; knows no abbreviations."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def validate(self, namespace: jsonargparse.Namespace, *arguments: Any, **options: Any) -> None:
        """Refuses what the base class lets pass in files: a section that holds no values, and null for a value that has to be."""
        for section in self.groups or ():
            values = namespace.get(section, jsonargparse.Namespace())
            if not isinstance(values, jsonargparse.Namespace):
                raise TypeError(f"{section} is {values!r}, expected a section with values")
        for action in self._actions:  # what is missing is null, too
            asked = action.required if action.option_strings else action.nargs in (None, "+")
            if asked and namespace.get(action.dest) is None:
                self.error(f"{''.join(action.option_strings[:1]) or action.dest} is missing, and has to be given")
        strict = (
            {} if self._subcommands_action else {"skip_unset": False}
        )  # each command's own parser comes to its values
        try:
            super().validate(namespace, *arguments, **options | strict)
        except KeyError as error:  # which jsonargparse cannot say of a subcommand's subcommand
            command, name = self._unknown(namespace)
            if name is None:
                raise
            command.error(f"there is no option {name}", error)

    def parse_args(self, args: Sequence[str], *arguments: Any, **options: Any) -> Any:
        """Refuses pipes and devices in the place of files of values, which the base class would read for ever."""
        for option, value in zip(["", *args], [*args, ""], strict=True):
            name, _, joined = value.partition("=")
            given = joined if name in _FROM_FILES else value if option in _FROM_FILES else ""
            if given and os.path.exists(given):
                try:
                    read_text(Path(given))
                except (OSError, ValueError) as error:
                    self.error(f"{given} cannot be read ({error})")
        return super().parse_args(args, *arguments, **options)

    def parse_path(self, path: str, *arguments: Any, **options: Any) -> Any:
        read_text(Path(path))  # ValueError for what is no short text
        return super().parse_path(path, *arguments, **options)

    def _unknown(self, namespace: jsonargparse.Namespace) -> tuple[Parser, str | None]:
        """The command that was chosen, and which of the values is none of its options."""
        command, place = self, ""
        while command._subcommands_action:
            name = namespace[f"{place}{command._subcommands_action.dest}"]
            command, place = command._subcommands_action.choices[name], f"{place}{name}."
        known = {action.dest for action in command._actions}
        given = (key.removeprefix(place) for key in vars(namespace.as_flat()) if key.startswith(place))
        return command, next((name for name in given if name not in known), None)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        command = self.prog.replace(" [options]", "")
        shortened = _shortened(" ".join(message.split()))
        raise SettingsError(f"{shortened}{self._nearest(message)} (see {command} --help)") from ex

    def _nearest(self, message: str) -> str:
        """Which option may have been meant, where the message is of one that there is not."""
        unknown = _UNKNOWN.match(message)
        if unknown is None:
            return ""
        dashes, name = unknown.groups(default="")
        options = [option.removeprefix("--") for action in self._actions for option in action.option_strings]
        return "".join(f"; did you mean {dashes}{near}?" for near in get_close_matches(name, options, 1, cutoff=0.8))


def _shortened(message: str) -> str:
    """jsonargparse's message with what may be chosen, instead of Python's types and what each of them has against the value."""
    message = _UNION.sub(r"Expected one of \1. Got value: ", message)
    message = _WORDS.sub(r"\1", _CHOICE.sub(r"one of \1", message))
    message = message.replace('in "<unicode string>", ', "in ").removeprefix('Parser key "config": ')
    return _CLASS.sub(r"\1", message).replace("NoneType", "null")
