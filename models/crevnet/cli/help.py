"""The text of `--help`, and of `--help-all`, which has every option and its whole description.

`--help` fits one screen: a command names the options that it lists, and each shows the first sentence of its description.
"""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

_COLUMN = 30
"""Where descriptions begin."""
_WIDEST = 100


@dataclass(frozen=True)
class Entry:
    """An option or an argument.

    Attributes:
        name: as one writes it, with its value's name.
        text: the description, one or more sentences.
        notes: what may be chosen, and the default.
        section: the heading that it is listed under.
        listed: whether `--help` lists it.
    """

    name: str
    text: str
    notes: tuple[str, ...] = ()
    section: str = "Options"
    listed: bool = True

    def described(self, everything: bool) -> str:
        text = self.text if everything else re.split(r"(?<=[^.]\.)\s", self.text, maxsplit=1)[0]
        text = f"{text[:1].upper()}{text[1:]}".removesuffix(".")
        return f"{text} ({'; '.join(self.notes)})" if self.notes else text


def command_help(prog: str, usage: str, description: str, entries: Sequence[Entry], everything: bool) -> str:
    """The help of a command. `prog` is its name, with that of the program."""
    shown = [entry for entry in entries if entry.listed or everything]
    sections: dict[str, dict[str, str]] = {}
    for entry in shown:
        sections.setdefault(entry.section, {})[entry.name] = entry.described(everything)
    parts = [_wrapped(f"Usage: {prog} {usage}", " " * len(f"Usage: {prog} ")), _wrapped(" ".join(description.split()))]
    parts += [_section(title, rows) for title, rows in sections.items()]
    if len(shown) < len(entries) or any(entry.described(True) != entry.described(False) for entry in entries):
        options = sum(entry.name.startswith("-") for entry in entries)
        parts.append(f"{prog} --help-all describes all {options} options.\n")
    return "\n".join(parts)


def commands_help(group: str, commands: Mapping[str, str]) -> str:
    """The help of the program, or of a group of commands such as `data`."""
    prog = f"crevnet {group}".strip()
    rows = {name.removeprefix(group).strip(): line for name, line in commands.items()}
    about = [] if group else ["Video prediction by CrevNet, a reversible network, and by other models.\n"]
    more = f"{prog} COMMAND --help lists the options of a command.\n"
    return "\n".join([f"Usage: {prog} COMMAND ...\n", *about, _section("Commands", rows, column=22), more])


def _section(title: str, rows: Mapping[str, str], column: int = _COLUMN) -> str:
    return "".join([f"{title}:\n", *(_row(name, text, column) for name, text in rows.items())])


def _row(name: str, text: str, column: int) -> str:
    """A name and its description beside it, or below a name that is too long."""
    first = f"  {name}".ljust(column)
    own_line = "" if first.endswith("  ") else f"  {name}\n"
    return own_line + _wrapped(f"{' ' * column if own_line else first}{text}", " " * column)


def _wrapped(text: str, indent: str = "") -> str:
    width = min(shutil.get_terminal_size().columns, _WIDEST)
    lines: Iterable[str] = textwrap.wrap(
        text.replace("default: ", "default:\u00a0"),  # with a space that no line breaks at
        width,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "".join(f"{line}\n".replace("\u00a0", " ") for line in lines)
