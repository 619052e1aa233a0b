"""Tensors and switches that modules hold outside of parameters and buffers: in attributes, lists, dictionaries and objects.

A *holder* is whatever keeps values by name: a module or another object, a dictionary, a list. Its contents are a shallow copy.
Modules are entered only as roots, and classes of PyTorch's and of the standard library not at all.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Contents = dict[Any, Any]

_INTERNAL = frozenset(vars(nn.Module()))
"""Attributes that every module has."""

_DICTIONARIES = (dict, OrderedDict, defaultdict)
_CONTAINERS = frozenset((*_DICTIONARIES, list, deque, set))
_PLAIN = frozenset(
    (int, float, bool, str, bytes, complex, type(None), Tensor, nn.Parameter, torch.Size, torch.dtype, torch.device)
)
_SWITCHES = (bool, str, type(None), Enum)
_FOREIGN = frozenset(
    ("builtins", "torch", "numpy", "threading", "logging", "functools", "types", "weakref", "re", "pathlib")
)
_ABSENT = object()
_MOST = 64
"""Holders that a walk visits; an attribute may lead to all of a program's objects."""


class Changed(NamedTuple):
    """A holder in which the first evaluation changed a tensor."""

    place: str
    holder: Any
    before: Contents


class Attributes:
    """What some modules hold before their first evaluation, and what has changed after it.

    The second evaluation sees the holders as the first one did, and leaves them as it found them: a value that a module
    computes once and remembers is recomputed with a graph; a running average moves once.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = modules
        roots = [m for m in modules if len(m.__dict__) > len(_INTERNAL)]
        self._bare = [m for m in modules if len(m.__dict__) <= len(_INTERNAL)]
        """Modules without attributes of their own."""
        self._held = [(place, holder, contents(holder)) for place, holder in holders_in(roots)]
        self._versions = [
            (f"{place}{_named(holder, name)}", value, value._version)
            for place, holder, held in self._held
            for name, value in held.items()
            if isinstance(value, Tensor) and not value.is_inference()
        ]
        self._changed: list[Changed] = []
        self._switches: list[tuple[dict[str, Any], Contents]] = []

    def keep_changes(self) -> None:
        """The first evaluation is done. Refuses tensors that it has changed in place."""
        for place, tensor, version in self._versions:
            if tensor._version != version:
                raise RuntimeError(
                    f"it changes its own tensor {place} in place, which is not a buffer, so the second evaluation would start "
                    f"from other values: register_buffer makes it one"
                )
        self._changed = [
            Changed(place, holder, before)
            for place, holder, before in self._held
            if _tensors_differ(before, contents(holder))
        ]
        for module in self._bare:
            if len(module.__dict__) > len(_INTERNAL) and _tensors_differ({}, contents(module)):
                self._changed.append(Changed(type(module).__name__, module, {}))
        self._held, self._versions = [], []
        for module in self._modules:
            own = module.__dict__
            if len(own) <= len(_INTERNAL):
                continue
            switches = {n: own[n] for n in own.keys() - _INTERNAL if isinstance(own[n], _SWITCHES)}
            if switches:
                self._switches.append((own, switches))

    def lend(self) -> list[tuple[Any, Contents]]:
        """Put everything as the first evaluation saw it; returns what `give_back` needs.

        Switches (booleans, strings, None) are as they were when it ended: an initialisation is not repeated.
        """
        held: list[tuple[Any, Contents]] = []
        for own, switches in self._switches:
            now = {name: own.get(name, _ABSENT) for name in switches}
            if now != switches:
                held.append((own, {**own}))
                own.update(switches)
        for _, holder, before in self._changed:
            held.append((holder, contents(holder)))
            refill(holder, before)
        return held

    def escaped(self) -> list[str]:
        """Places in which the second evaluation has left tensors of its graph."""
        return [
            place
            for where, holder, before in self._changed
            for name, value in contents(holder).items()
            if value is not before.get(name, _ABSENT) and not _is_derived(holder, name)
            for place, tensor in tensors_in(value, f"{where}{_named(holder, name)}")
            if tensor.requires_grad
        ]

    @property
    def matter(self) -> bool:
        """Whether the second evaluation needs them."""
        return bool(self._changed or self._switches)


def give_back(held: list[tuple[Any, Contents]]) -> None:
    for holder, now in reversed(held):
        refill(holder, now)


def contents(holder: Any) -> Contents:
    """Values by name, key or position."""
    kind = type(holder)
    if kind in _DICTIONARIES:
        return dict(holder)
    if kind in _CONTAINERS or isinstance(holder, tuple):
        return dict(enumerate(holder))
    if isinstance(holder, nn.Module):
        own = vars(holder)
        return {name: own[name] for name in own.keys() - _INTERNAL}
    slots = {name: getattr(holder, name) for name in _slots(kind) if hasattr(holder, name)}
    return slots | getattr(holder, "__dict__", {})


def refill(holder: Any, held: Contents) -> None:
    """Give the holder these contents again."""
    kind = type(holder)
    if kind is list:
        holder[:] = held.values()
    elif kind in (deque, set):
        holder.clear()
        (holder.extend if kind is deque else holder.update)(held.values())
    elif kind in _DICTIONARIES:
        holder.clear()
        holder.update(held)
    else:
        for name in contents(holder).keys() - held.keys():
            object.__delattr__(holder, name)
        for name, value in held.items():
            object.__setattr__(holder, name, value)


def holders_in(roots: Iterable[Any]) -> list[tuple[str, Any]]:
    """The roots, and whatever they lead to, each with its place."""
    found: list[tuple[str, Any]] = [(type(root).__name__, root) for root in roots]
    seen = {id(root) for _, root in found}
    most = len(found) + _MOST
    for place, holder in found:  # which grows on the way
        for name, value in contents(holder).items():
            if type(value) in _PLAIN or id(value) in seen or len(found) >= most:
                continue
            if type(value) in _CONTAINERS or isinstance(value, tuple) or _is_object(value):
                seen.add(id(value))
                found.append((f"{place}{_named(holder, name)}", value))
    return [(place, holder) for place, holder in found if not isinstance(holder, tuple)]


def tensors_in(value: Any, place: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that `value` is or leads to, with its place."""
    if isinstance(value, Tensor):
        yield place, value
    elif type(value) in _CONTAINERS or isinstance(value, tuple) or _is_object(value):
        for where, holder in holders_in([_Root(value)]):
            if not isinstance(holder, _Root):
                for name, inner in contents(holder).items():
                    if isinstance(inner, Tensor):
                        yield f"{place}{where.removeprefix(_ROOT)}{_named(holder, name)}", inner


STATE_IN_CONTEXT = (
    "state in the context. A conditioner is evaluated twice, the first time without a graph: what it stores in an argument would "
    "get no gradient, and the second evaluation would find it filled. In training pass no cache (use_cache=False in "
    "transformers); let results leave through a stream"
)


class Reachable:
    """The tensors that the keyword arguments of a call lead to, before a conditioner is evaluated with them."""

    def __init__(self, context: dict[str, Any]) -> None:
        self._context, self._found = context, _with_versions(context)

    def changed(self) -> str | None:
        """Where an evaluation has stored a tensor."""
        now = _with_versions(self._context)
        for place in self._found | now:
            before, after = self._found.get(place), now.get(place)
            if before is None or after is None or before[0] is not after[0] or before[1] != after[1]:
                return place
        return None

    def refuse_changes(self, module: nn.Module) -> None:
        """The evaluation is done."""
        place = self.changed()
        if place is not None:
            raise RuntimeError(f"the conditioner {type(module).__name__} changed {place}: {STATE_IN_CONTEXT}")


def has_holders(context: dict[str, Any]) -> bool:
    """Whether there is something in the keyword arguments in which a conditioner may store a tensor."""
    return any(type(v) not in _PLAIN and len(holders_in([_Root(v)])) > 1 for v in context.values())


def _with_versions(context: dict[str, Any]) -> dict[str, tuple[Tensor, int]]:
    return {
        place: (tensor, 0 if tensor.is_inference() else tensor._version)
        for name, value in context.items()
        for place, tensor in tensors_in(value, name)
    }


def copied(value: Any, *also: Any) -> Any:
    """A deep copy, in which tensors that have a graph are copied without it: PyTorch refuses to copy those."""
    memo: dict[int, Any] = {}
    for root in (value, *also):
        for _, tensor in _all_tensors(root):
            if tensor.grad_fn is not None:
                memo[id(tensor)] = tensor.detach().clone()
    return copy.deepcopy(value, memo)


def place_of(tensor: Tensor, roots: dict[str, Any]) -> str | None:
    """Where the tensor is found, from the roots on; modules are entered, too. For errors: this takes its time."""
    return next((place for place, found in _all_tensors(roots) if found is tensor), None)


def _all_tensors(roots: dict[str, Any] | nn.Module | Any) -> Iterator[tuple[str, Tensor]]:
    """All that the roots lead to, modules entered, with their places."""
    found = list(roots.items()) if type(roots) is dict else [(type(roots).__name__, roots)]
    seen = set[int]()
    for place, value in found:  # which grows on the way
        if isinstance(value, Tensor):
            yield place, value
        if id(value) in seen or len(found) > _MOST**3 or type(value) in _PLAIN:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            inner = contents(value) | value._parameters | value._buffers | value._modules
        elif type(value) in _CONTAINERS or isinstance(value, tuple) or _is_object(value):
            inner = contents(value)
        else:
            continue
        found += [(f"{place}{_named(value, name)}", held) for name, held in inner.items()]


class _Root:
    def __init__(self, value: Any) -> None:
        self.value = value


_ROOT = "_Root.value"


def _tensors_differ(before: Contents, after: Contents) -> bool:
    """Whether a tensor, or something that holds tensors, came, went or was replaced."""
    names = [n for n in before.keys() | after.keys() if before.get(n, _ABSENT) is not after.get(n, _ABSENT)]
    return any(next(tensors_in(held.get(n), ""), None) is not None for n in names for held in (before, after))


def _is_derived(holder: Any, name: str) -> bool:
    """Whether a hook of torch.nn.utils computes this attribute before each call: `weight` under the older `weight_norm`."""
    return isinstance(holder, nn.Module) and any(
        getattr(hook, "name", None) == name for hook in holder._forward_pre_hooks.values()
    )


def _is_object(value: Any) -> bool:
    kind = type(value)
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


def _named(holder: Any, name: Any) -> str:
    return f"[{name!r}]" if type(holder) in _CONTAINERS or isinstance(holder, tuple) else f".{name}"
