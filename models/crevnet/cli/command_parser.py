"""The parser of one command: its options, their help, and their values."""

from __future__ import annotations

import re
from argparse import SUPPRESS, Action
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, get_type_hints

from jsonargparse import Namespace

from crevnet.cli.commands import Command
from crevnet.cli.help import Entry, command_help
from crevnet.cli.value_names import choices_note, value_name, written
from crevnet.machine.errors import SettingsError
from crevnet.machine.parser import Parser

_SHORT = re.compile(r"--model(=.*)?")
"""jsonargparse reads a file with the model's values from --model; here it is short for --model.name."""


class CommandParser(Parser):
    """The parser of a command, with the options that its file adds for these arguments.

    Attributes:
        arguments: the words after the command. Defaults of some options depend on others in them.
    """

    def __init__(self, name: str, command: Command, arguments: Sequence[str]) -> None:
        words = name.replace("-", "_").split()
        super().__init__(
            prog=f"crevnet {name}",
            description=command.__doc__,
            add_help=False,
            env_prefix=f"crevnet_{'__'.join(words)}_",  # CREVNET_FIT__DATA__ROOT, if jsonargparse reads the environment
        )
        self.arguments = [_SHORT.sub(r"--model.name\1", a) if _SHORT.fullmatch(a) else a for a in arguments]
        self._types: dict[str, Any] = {}
        self._named: set[str] = set()
        self._common: set[str] = set()
        command.add_options(self)

    def add_option(self, name: str, **options: Any) -> None:
        """Add an option or an argument, as `add_argument` does."""
        action = self.add_argument(name, **options)
        self._types[action.dest] = options.get("type")
        if "metavar" in options:
            self._named.add(action.dest)

    def add_class_arguments(self, theclass: Any, nested_key: str | None = None, *arguments: Any, **options: Any) -> Any:
        self._types |= {f"{nested_key}.{name}": hint for name, hint in get_type_hints(theclass).items()}
        added = super().add_class_arguments(theclass, nested_key, *arguments, **options)
        self.describe(str(nested_key), "FILE", "YAML file with the options of this section")
        return added

    def name_section(self, key: str, title: str) -> None:
        """Set the heading of a class's options in help."""
        (self.groups or {})[key].title = title

    def list_in_help(self, *names: str) -> None:
        """Name the options of sections that `--help` lists; `--help-all` lists all."""
        self._common.update(names)

    def describe(self, name: str, value: str, text: str) -> None:
        """Give an option another value's name and another description."""
        for action in self._actions:
            if action.dest == name:
                action.metavar, action.help = value, text
        self._named.add(name)

    def value_of(self, option: str) -> str | None:
        """The value on the command line of an option that must be known before the others can be parsed."""
        return value_of(option, self.arguments)

    def add_config(self) -> None:
        """Add --config, a file of options, and --print_config."""
        self.add_argument("--config", action="config")
        self.describe("config", "FILE", "YAML file with options, such as a run's config.yaml")
        self.describe("print_config", "", "Print all options as YAML for --config, and exit")

    def values(self) -> Namespace:
        """The options' values. Raises SettingsError."""
        self.refuse_pipes(self.arguments)
        try:
            values: Namespace = self.instantiate(self.parse_args(self.arguments))
            return values
        except ValueError as error:
            raise SettingsError(str(error)) from error

    def help_text(self, everything: bool) -> str:
        actions = [action for action in self._actions if action.help != SUPPRESS]
        positional = [action for action in actions if not action.option_strings]
        required = [action for action in actions if action.option_strings and action.required]
        usage = [
            *(_of_arguments(action) for action in positional),
            *(self._name(action) for action in required),
            *(["[OPTIONS]"] if len(actions) > len(positional) + len(required) else []),
        ]
        entries = [self._entry(action) for action in actions]
        return command_help(self.prog, " ".join(usage), self.description or "", entries, everything)

    def _entry(self, action: Action) -> Entry:
        section, text, notes = self._section(action), " ".join((action.help or "").split()), []
        if not action.option_strings:
            return Entry(_of_arguments(action), text, section="Arguments")
        choices = choices_note(action.option_strings[0], self._types.get(action.dest))
        if choices and action.dest not in self._named:
            notes.append(choices)
        if action.required:
            notes.append("required")
        elif action.nargs != 0 and action.default is not SUPPRESS and written(action.default):
            notes.append(f"default: {written(action.default)}")
        listed = section == "Options" or action.dest in self._common
        return Entry(self._name(action), text, tuple(notes), section, listed)

    def _name(self, action: Action) -> str:
        option = action.option_strings[0]
        if action.nargs == 0:
            return option
        if action.dest in self._named:
            return f"{option} {action.metavar}"
        return f"{option} {value_name(option, self._types.get(action.dest))}"

    def _section(self, action: Action) -> str:
        group = (self.groups or {}).get(action.dest.partition(".")[0])
        return "Options" if group is None else str(group.title).removesuffix(".")


def parsed(name: str, command: Command, arguments: Sequence[str]) -> Namespace:
    """The values of a command's options.

    Raises SettingsError, which names the configuration file if the same command line without the file is right or has
    another error.
    """
    try:
        return CommandParser(name, command, arguments).values()
    except SettingsError as error:
        config = value_of("--config", arguments)
        if config is None or _error_of(name, command, _without("--config", arguments)) == str(error):
            raise
        raise SettingsError(f"--config {config}: {error}") from error


def value_of(option: str, arguments: Sequence[str]) -> str | None:
    """The value of an option on the command line, if it is there."""
    for argument, following in zip_longest(arguments, arguments[1:]):
        if argument == option:
            return following
        if argument.startswith(f"{option}="):
            return str(argument.partition("=")[2])
    return None


def _of_arguments(action: Action) -> str:
    """A positional argument in the usage."""
    return f"{action.dest.upper()}{'...' if action.nargs == '+' else ''}"


def _error_of(name: str, command: Command, arguments: Sequence[str]) -> str | None:
    try:
        CommandParser(name, command, arguments).values()
    except SettingsError as error:
        return str(error)
    return None


def _without(option: str, arguments: Sequence[str]) -> list[str]:
    """The command line without an option and its value."""
    pairs = zip(["", *arguments], arguments, strict=False)
    return [a for before, a in pairs if before != option and a != option and not a.startswith(f"{option}=")]
