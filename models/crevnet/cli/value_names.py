"""The values of an option, as help writes them: a name by their type, the choices, and the default."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from crevnet.machine.wording import listed

_NAMES: dict[Any, str] = {int: "N", float: "X", str: "NAME", Path: "PATH", bool: "true|false"}
_ROOM = 26
"""Maximum length of an option that is followed by its choices."""


def value_name(option: str, hint: Any) -> str:
    """The name of an option's value: `N` for a whole number, `[NAME,...]` for a list of names, or a few short choices."""
    choices, kinds = _choices(hint), [_kind(kind) for kind in _alternatives(hint) if get_origin(kind) is not Literal]
    written = "|".join([*choices, *kinds])
    return written if len(f"{option} {written}") <= _ROOM or not choices else "NAME"


def choices_note(option: str, hint: Any) -> str | None:
    """The choices, unless they are the value's name."""
    choices = _choices(hint)
    if not choices:
        for kind in _alternatives(hint):
            choices = choices or [choice for item in get_args(kind) for choice in _choices(item)]
        return listed(choices, "and") if choices else None
    if value_name(option, hint) != "NAME":
        return None
    kinds = [_kind(kind) for kind in _alternatives(hint) if get_origin(kind) is not Literal]
    return listed([*choices, *kinds], "or")


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


def _kind(kind: Any) -> str:
    if get_origin(kind) not in (list, tuple):
        return _NAMES.get(kind, "NAME")
    items = get_args(kind)
    if get_origin(kind) is tuple and Ellipsis not in items:
        return f"[{','.join(map(_kind, items))}]"
    return f"[{_kind(items[0])},...]"
