"""`main`: find the command, print its help or run it, and end with an exit status."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from difflib import get_close_matches

from crevnet.cli.command_parser import CommandParser, parsed
from crevnet.cli.commands import COMMANDS, command_named
from crevnet.cli.console import console
from crevnet.cli.exit_status import exit_status
from crevnet.cli.help import commands_help
from crevnet.machine.errors import SettingsError
from crevnet.machine.processes import is_first

_HELP = {"-h", "--help", "--help-all"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command. An error is one line on stderr, with exit status 1 if the machine lacks something, such as disk space,
    and 2 if settings or data are wrong."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names need not be UTF-8
            stream.reconfigure(errors="backslashreplace")
    with exit_status():
        _run(sys.argv[1:] if arguments is None else list(arguments))


def _run(arguments: list[str]) -> None:
    name, options = _found(arguments)
    if name not in COMMANDS:
        return _print(commands_help(name, {command: COMMANDS[command] for command in _within(name)}))
    command = command_named(name)
    if _HELP.intersection(options):
        parser = CommandParser(name, command, [option for option in options if option not in _HELP])
        return _print(parser.help_text(everything="--help-all" in options))
    values = parsed(name, command, options)
    console.quiet = not is_first()
    command.run(values)


def _found(arguments: list[str]) -> tuple[str, list[str]]:
    """A command's name and the arguments after it; the name of a group, or none, when its help is requested.

    Raises SettingsError for a name that does not exist."""
    name = ""
    for number, word in enumerate(arguments):
        if word in _HELP:
            return name, []
        longer = f"{name} {word}".strip()
        if not _within(longer):
            near = get_close_matches(word, _next_words(name), 1)
            suggestion = f"; did you mean {near[0]}?" if near else f": choose {_choices(name)}"
            what = "option before the command" if word.startswith("-") else "command"
            raise SettingsError(f"there is no {what} {longer}{suggestion} (see {_prog(name)} --help)")
        name = longer
        if name in COMMANDS:
            return name, arguments[number + 1 :]
    raise SettingsError(f"{_prog(name)} needs a command: choose {_choices(name)} (see {_prog(name)} --help)")


def _within(name: str) -> list[str]:
    """The commands that begin with these words."""
    return [command for command in COMMANDS if f"{command} ".startswith(f"{name} ".lstrip())]


def _next_words(name: str) -> list[str]:
    return list(dict.fromkeys(command.removeprefix(name).split()[0] for command in _within(name)))


def _choices(name: str) -> str:
    *others, last = _next_words(name)
    return f"{', '.join(others)} or {last}" if others else last


def _prog(name: str) -> str:
    return f"crevnet {name}".strip()


def _print(text: str) -> None:
    sys.stdout.write(text)
