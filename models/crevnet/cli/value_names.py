"""The values of an option, as help writes them: a name by their type, the choices, and the default."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

_NAMES: dict[Any, str] = {int: "N", float: "X", str: "NAME", Path: "PATH", bool: "true|false"}
_ROOM = 26
"""Maximum length of an option that is followed by its choices."""


def value_name(option: str, hint: Any) -> str:
    """The name of an option's value: `N` for a whole number, `[NAME,...]` for a list of names, or a few short choices."""
    if set(_alternatives(hint)) == {int, float, str}:
        return "SIZE"  # bytes, a share, or a number with a unit
    choices = _choices(hint)
    others = [_kind(option, kind) for kind in _alternatives(hint) if get_origin(kind) is not Literal]
    written = "|".join([*choices, *others])
    return written if len(f"{option} {written}") <= _ROOM or not choices else "NAME"


def choices_of(option: str, hint: Any) -> tuple[str, ...]:
    """The choices for a value or for a list's values; none if they are the value's name."""
    choices = _choices(hint) or [
        choice for kind in _alternatives(hint) for item in get_args(kind) for choice in _choices(item)
    ]
    return () if "|" in value_name(option, hint) else tuple(choices)


def written(value: Any) -> str:
    """A value as the command line accepts it; empty for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(written, value))}]"
    return str(value)


def _alternatives(hint: Any) -> list[Any]:
    alternatives = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return [kind for kind in alternatives if kind not in (None, type(None))]


def _choices(hint: Any) -> list[str]:
    return [str(choice) for kind in _alternatives(hint) if get_origin(kind) is Literal for choice in get_args(kind)]


def _kind(option: str, kind: Any) -> str:
    if get_origin(kind) not in (list, tuple):
        return "DATE" if kind is str and "date" in option else _NAMES.get(kind, "NAME")
    items = get_args(kind)
    if get_origin(kind) is tuple and Ellipsis not in items:
        return f"[{','.join(_kind(option, item) for item in items)}]"
    return f"[{_kind(option, items[0])},...]"
