"""How help writes the values of an option: their name by their type, what may be chosen, and the default."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

_NAMES: dict[Any, str] = {int: "N", float: "X", str: "NAME", Path: "PATH", bool: "true|false"}
_ROOM = 26
"""Characters of an option with its choices that fit beside the description."""


def value_name(option: str, hint: Any) -> str:
    """What follows an option: `N` for a whole number, `[NAME,...]` for a list of names, short choices themselves."""
    choices, kinds = _choices(hint), [_kind(kind) for kind in _alternatives(hint) if get_origin(kind) is not Literal]
    written = "|".join([*choices, *kinds])
    return written if len(f"{option} {written}") <= _ROOM or not choices else "VALUE"


def choices_note(option: str, hint: Any) -> str | None:
    """What may be chosen, if it does not follow the option."""
    choices = _choices(hint)
    if not choices:
        for kind in _alternatives(hint):
            choices = choices or [choice for item in get_args(kind) for choice in _choices(item)]
        return _listed(choices, "and") if choices else None
    if value_name(option, hint) != "VALUE":
        return None
    kinds = [_kind(kind) for kind in _alternatives(hint) if get_origin(kind) is not Literal]
    return _listed([*choices, *kinds], "or")


def written(value: Any) -> str:
    """A default as one writes it on the command line; empty for none."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(written, value))}]"
    return str(value)


def _listed(words: list[str], conjunction: str) -> str:
    *others, last = words
    return f"{', '.join(others)} {conjunction} {last}" if others else last


def _alternatives(hint: Any) -> list[Any]:
    alternatives = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return [kind for kind in alternatives if kind not in (None, type(None))]


def _choices(hint: Any) -> list[str]:
    return [str(choice) for kind in _alternatives(hint) if get_origin(kind) is Literal for choice in get_args(kind)]


def _kind(kind: Any) -> str:
    if get_origin(kind) not in (list, tuple):
        return _NAMES.get(kind, "VALUE")
    items = get_args(kind)
    if get_origin(kind) is tuple and Ellipsis not in items:
        return f"[{','.join(map(_kind, items))}]"
    return f"[{_kind(items[0])},...]"
