"""Objects that hold values by name, key or position: modules and other objects, dictionaries, lists, deques, sets, tuples.

Two walks lead from such a holder to the tensors in it:

- `holders_in` and `tensors_in` follow attributes, but enter a module only if it is one of the given roots. The caller passes
  each module of a network as a root, and parameters and buffers are stored elsewhere.
- `all_tensors` also enters modules, with their parameters, buffers and submodules. It serves error messages, copies and keyword
  arguments.

Both skip objects of the packages in `_FOREIGN`. Both stop after a number of values, since an attribute may lead to all objects of
a program.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable, Iterator
from enum import Enum
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

Contents = dict[Any, Any]
"""A holder's values by name, key or position: a shallow copy."""

INTERNAL = frozenset(vars(nn.Module()))
"""Attributes that every module has."""
ABSENT = object()
"""Marks a name that a holder does not have. None would be ambiguous, since it is a possible value."""

_CONTAINERS = (dict, list, deque, set)
_WITH_PLACES = (*_CONTAINERS, tuple)
_WITHOUT_CONTENTS = frozenset(
    (int, float, bool, str, bytes, complex, type(None), Tensor, nn.Parameter, torch.Size, torch.dtype, torch.device)
)
_FOREIGN = frozenset(
    ("builtins", "torch", "numpy", "threading", "logging", "functools", "types", "weakref", "re", "pathlib")
)
_MOST_HOLDERS = 64
"""Holders that `holders_in` visits in addition to the roots."""
_MOST_VALUES = 64**3
"""Values that `all_tensors` visits."""


def contents(holder: Any) -> Contents:
    """A holder's values. Of a module, these are the attributes that not every module has."""
    if isinstance(holder, dict):
        return dict(holder)
    if isinstance(holder, _WITH_PLACES):
        return dict(enumerate(holder))
    if isinstance(holder, nn.Module):
        own = vars(holder)
        return {name: own[name] for name in own.keys() - INTERNAL}
    slots = {name: getattr(holder, name) for name in _slots(type(holder)) if hasattr(holder, name)}
    return slots | getattr(holder, "__dict__", {})


def refill(holder: Any, held: Contents) -> None:
    """Give the holder these contents, and no others. Methods that a subclass overrides are not called."""
    if isinstance(holder, list):
        holder[:] = held.values()
    elif isinstance(holder, (deque, set)):
        holder.clear()
        (holder.extend if isinstance(holder, deque) else holder.update)(held.values())
    elif isinstance(holder, dict):
        dict.clear(holder)
        dict.update(holder, held)
    else:
        for name in contents(holder).keys() - held.keys():
            object.__delattr__(holder, name)
        for name, value in held.items():
            object.__setattr__(holder, name, value)


def put(holder: Any, values: Contents) -> None:
    """Set these attributes of an object, and leave its others."""
    for name, value in values.items():
        object.__setattr__(holder, name, value)


def is_container(value: Any) -> bool:
    return isinstance(value, _CONTAINERS)


def suffix(holder: Any, name: Any) -> str:
    """`[name]` or `.name`: the end of the place of a holder's value."""
    return f"[{name!r}]" if isinstance(holder, _WITH_PLACES) else f".{name}"


def holders_in(roots: Iterable[Any]) -> list[tuple[str, Any]]:
    """The roots and the holders that they lead to, each with its place; modules are entered only as roots."""
    found: list[tuple[str, Any]] = [(type(root).__name__, root) for root in roots]
    seen = {id(root) for _, root in found}
    most = len(found) + _MOST_HOLDERS
    for place, holder in found:  # grows during the loop
        for name, value in contents(holder).items():
            if type(value) in _WITHOUT_CONTENTS or id(value) in seen or len(found) >= most:
                continue
            if isinstance(value, _WITH_PLACES) or _is_object(value):
                seen.add(id(value))
                found.append((f"{place}{suffix(holder, name)}", value))
    return found


def tensors_in(value: Any, place: str) -> Iterator[tuple[str, Tensor]]:
    """Each tensor that `value` is or leads to, with its place, which begins with `place`; modules are not entered."""
    if isinstance(value, Tensor):
        yield place, value
    elif isinstance(value, _WITH_PLACES) or _is_object(value):
        root = type(value).__name__
        for where, holder in holders_in([value]):
            for name, inner in contents(holder).items():
                if isinstance(inner, Tensor):
                    yield f"{place}{where.removeprefix(root)}{suffix(holder, name)}", inner


def all_tensors(roots: dict[str, Any] | nn.Module | Any) -> Iterator[tuple[str, Tensor]]:
    """Each tensor that the roots are or lead to, with its place; modules are entered. `roots` is a holder, or holders by name."""
    found = list(roots.items()) if type(roots) is dict else [(type(roots).__name__, roots)]
    seen = set[int]()
    for place, value in found:  # grows during the loop
        if isinstance(value, Tensor):
            yield place, value
        if id(value) in seen or len(found) > _MOST_VALUES or type(value) in _WITHOUT_CONTENTS:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            inner = contents(value) | value._parameters | value._buffers | value._modules
        elif isinstance(value, _WITH_PLACES) or _is_object(value):
            inner = contents(value)
        else:
            continue
        found += [(f"{place}{suffix(value, name)}", held) for name, held in inner.items()]


def place_of(tensor: Tensor, roots: dict[str, Any]) -> str | None:
    """The place of a tensor below the roots; None if they do not lead to it. The walk is slow: for error messages only."""
    return next((place for place, found in all_tensors(roots) if found is tensor), None)


def copied(value: Any, *also: Any) -> Any:
    """A deep copy. Tensors in `value` and `also` that have a graph are copied without it: PyTorch refuses to copy those."""
    memo: dict[int, Any] = {}
    for root in (value, *also):
        for _, tensor in all_tensors(root):
            if tensor.grad_fn is not None:
                memo[id(tensor)] = tensor.detach().clone()
    return copy.deepcopy(value, memo)


def is_holder(value: Any) -> bool:
    """Whether a tensor can be stored in this value, or in a value that it leads to."""
    if type(value) in _WITHOUT_CONTENTS:
        return False
    if isinstance(value, tuple):
        return any(map(is_holder, value))
    return isinstance(value, (*_CONTAINERS, nn.Module)) or _is_object(value)


def _is_object(value: Any) -> bool:
    """Whether this is an object with attributes, of a class that belongs to no package in `_FOREIGN`, and not a module."""
    kind = type(value)
    if kind is SimpleNamespace:
        return True
    return (
        kind.__module__.partition(".")[0] not in _FOREIGN
        and not isinstance(value, (nn.Module, type, Enum, Tensor))
        and (hasattr(value, "__dict__") or bool(_slots(kind)))
    )


def _slots(kind: type) -> list[str]:
    """The names in `__slots__` of a class and its bases."""
    names = [vars(base).get("__slots__", ()) for base in kind.__mro__]
    return [
        name for given in names for name in ((given,) if isinstance(given, str) else given) if name != "__weakref__"
    ]
