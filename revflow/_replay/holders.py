"""Whatever keeps values by name: a module or another object, a dictionary, a list.

The contents of a holder are a shallow copy. Modules are entered only as roots, and objects of PyTorch's and of the standard
library not at all.
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

INTERNAL = frozenset(vars(nn.Module()))
"""Attributes that every module has."""

_CONTAINERS = (dict, list, deque, set)
_WITH_PLACES = (*_CONTAINERS, tuple)
PLAIN = frozenset(
    (int, float, bool, str, bytes, complex, type(None), Tensor, nn.Parameter, torch.Size, torch.dtype, torch.device)
)
_FOREIGN = frozenset(
    ("builtins", "torch", "numpy", "threading", "logging", "functools", "types", "weakref", "re", "pathlib")
)
ABSENT = object()
_MOST = 64
"""Holders that a walk visits; an attribute may lead to all of a program's objects."""


def contents(holder: Any) -> Contents:
    """Values by name, key or position."""
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
    """Give the holder these contents again."""
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
    """Give an object these attributes, among others."""
    for name, value in values.items():
        object.__setattr__(holder, name, value)


def is_container(value: Any) -> bool:
    return isinstance(value, _CONTAINERS)


def holders_in(roots: Iterable[Any]) -> list[tuple[str, Any]]:
    """The roots, and whatever they lead to, each with its place."""
    found: list[tuple[str, Any]] = [(type(root).__name__, root) for root in roots]
    seen = {id(root) for _, root in found}
    most = len(found) + _MOST
    for place, holder in found:  # which grows on the way
        for name, value in contents(holder).items():
            if type(value) in PLAIN or id(value) in seen or len(found) >= most:
                continue
            if isinstance(value, _WITH_PLACES) or _is_object(value):
                seen.add(id(value))
                found.append((f"{place}{named(holder, name)}", value))
    return found


def tensors_in(value: Any, place: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that `value` is or leads to, with its place."""
    if isinstance(value, Tensor):
        yield place, value
    elif isinstance(value, _WITH_PLACES) or _is_object(value):
        for where, holder in holders_in([Root(value)]):
            if not isinstance(holder, Root):
                for name, inner in contents(holder).items():
                    if isinstance(inner, Tensor):
                        yield f"{place}{where.removeprefix(_ROOT)}{named(holder, name)}", inner


def copied(value: Any, *also: Any) -> Any:
    """A deep copy, in which tensors that have a graph are copied without it: PyTorch refuses to copy those."""
    memo: dict[int, Any] = {}
    for root in (value, *also):
        for _, tensor in all_tensors(root):
            if tensor.grad_fn is not None:
                memo[id(tensor)] = tensor.detach().clone()
    return copy.deepcopy(value, memo)


def place_of(tensor: Tensor, roots: dict[str, Any]) -> str | None:
    """Where the tensor is found, from the roots on; modules are entered, too. For errors: this takes its time."""
    return next((place for place, found in all_tensors(roots) if found is tensor), None)


def all_tensors(roots: dict[str, Any] | nn.Module | Any) -> Iterator[tuple[str, Tensor]]:
    """All that the roots lead to, modules entered, with their places."""
    found = list(roots.items()) if type(roots) is dict else [(type(roots).__name__, roots)]
    seen = set[int]()
    for place, value in found:  # which grows on the way
        if isinstance(value, Tensor):
            yield place, value
        if id(value) in seen or len(found) > _MOST**3 or type(value) in PLAIN:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            inner = contents(value) | value._parameters | value._buffers | value._modules
        elif isinstance(value, _WITH_PLACES) or _is_object(value):
            inner = contents(value)
        else:
            continue
        found += [(f"{place}{named(value, name)}", held) for name, held in inner.items()]


class Root:
    def __init__(self, value: Any) -> None:
        self.value = value


_ROOT = "Root.value"


def is_holder(value: Any) -> bool:
    """Whether a tensor can be stored in it, or in what it leads to."""
    if type(value) in PLAIN:
        return False
    if isinstance(value, tuple):
        return any(map(is_holder, value))
    return isinstance(value, (*_CONTAINERS, nn.Module)) or _is_object(value)


def _is_object(value: Any) -> bool:
    kind = type(value)
    if kind is SimpleNamespace:
        return True
    return (
        kind.__module__.partition(".")[0] not in _FOREIGN
        and not isinstance(value, (nn.Module, type, Enum, Tensor))
        and (hasattr(value, "__dict__") or bool(_slots(kind)))
    )


def _slots(kind: type) -> list[str]:
    names = [vars(base).get("__slots__", ()) for base in kind.__mro__]
    return [
        name for given in names for name in ((given,) if isinstance(given, str) else given) if name != "__weakref__"
    ]


def named(holder: Any, name: Any) -> str:
    return f"[{name!r}]" if isinstance(holder, _WITH_PLACES) else f".{name}"
