"""Tensors and switches in modules' attributes, outside of parameters and buffers.

A switch is a boolean, a string, None, a member of an Enum, or a container of those: it may choose between ways of computing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import Any, NamedTuple

from torch import Tensor, nn

from revflow._replay.holders import (  # fmt: skip
    ABSENT,
    INTERNAL,
    Contents,
    contents,
    holders_in,
    is_container,
    put,
    refill,
    suffix,
    tensors_in,
)

_SWITCHES = (bool, str, type(None), Enum)

Held = tuple[Callable[[Any, Contents], None], Any, Contents]
"""A function that gives a holder its contents back, and its arguments: the holder and the contents."""


class Changed(NamedTuple):
    """A holder in which the first evaluation replaced, added or removed a tensor, with its contents before."""

    place: str
    holder: Any
    before: Contents


class Attributes:
    """Attributes of some modules, before their first evaluation and after it.

    The second evaluation finds the attributes as the first one did, and leaves them as they were before it. So a value that a
    module computes once and caches is recomputed with a graph, and a running average moves once.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        roots = [m for m in modules if len(m.__dict__) > len(INTERNAL)]
        self._bare = [m for m in modules if len(m.__dict__) <= len(INTERNAL)]
        """Modules without attributes of their own, whose contents are not copied."""
        # Many modules have only submodules, and need no walk.
        holders = holders_in(roots) if roots else ()
        self._held = [(place, h, contents(h)) for place, h in holders if not isinstance(h, tuple)]
        self._versions = [
            (f"{place}{suffix(holder, name)}", value, value._version)
            for place, holder, held in self._held
            for name, value in held.items()
            if isinstance(value, Tensor) and not value.is_inference()
        ]
        self._changed: list[Changed] = []
        self._moved: list[tuple[Contents, Any]] = []
        self._switches: list[tuple[Any, Contents]] = []

    def keep_changes(self) -> None:
        """Find what the first evaluation, which has ended, changed. RuntimeError for a tensor that it changed in place."""
        for place, tensor, version in self._versions:
            if tensor._version != version:
                raise RuntimeError(
                    f"the module changes its own tensor {place} in place, which is not a buffer. The second evaluation would "
                    f"start from other values. Make it a buffer, by register_buffer"
                )
        self._changed = [
            Changed(place, holder, before)
            for place, holder, before in self._held
            if _tensors_differ(before, contents(holder))
        ]
        for module in self._bare:
            if len(module.__dict__) > len(INTERNAL) and _tensors_differ({}, contents(module)):
                self._changed.append(Changed(type(module).__name__, module, {}))
        self._switches = [(h, found) for _, h, _ in self._held if (found := _switches_of(h))]
        self._held, self._versions = [], []

    def lend(self) -> list[Held]:
        """Put the attributes into their state before the first evaluation; returns the argument of `give_back`.

        Switches get their values after the first evaluation instead, so that the second one does not repeat an initialization.
        """
        held: list[Held] = []
        for holder, switches in self._switches:
            now = contents(holder)
            if is_container(holder):
                if now != switches:
                    held.append((refill, holder, now))
                    refill(holder, switches)
            elif any(_is_switched(now.get(name, ABSENT), value) for name, value in switches.items()):
                held.append((put, holder, {name: now[name] for name in now.keys() & switches.keys()}))
                put(holder, switches)
        for _, holder, before in self._changed:
            held.append((refill, holder, contents(holder)))
            refill(holder, before)
        return held

    def moved(self) -> list[Tensor]:
        """The tensors that the first evaluation replaced, for autograd to save; they are removed from here."""
        values: list[Tensor] = []
        self._moved = []
        for _, holder, before in self._changed:
            now = contents(holder)
            for name, value in before.items():
                if isinstance(value, Tensor) and now.get(name) is not value:
                    self._moved.append((before, name))
                    values.append(value)
        for before, name in self._moved:
            before[name] = None
        return values

    def recall(self, moved: Sequence[Tensor]) -> None:
        """Insert the tensors that `moved` removed."""
        for (before, name), value in zip(self._moved, moved, strict=True):
            before[name] = value

    def escaped(self) -> list[str]:
        """Places in which the second evaluation left tensors of its graph."""
        return [
            place
            for where, holder, before in self._changed
            for name, value in contents(holder).items()
            if value is not before.get(name, ABSENT) and not _is_derived(holder, name)
            for place, tensor in tensors_in(value, f"{where}{suffix(holder, name)}")
            if tensor.requires_grad
        ]

    def switches(self) -> tuple[object, ...]:
        """The switches' values after the first evaluation, in a form that can be compared."""
        values = [value for _, switches in self._switches for value in switches.values()]
        return tuple([repr(value) if is_container(value) else value for value in values])

    @property
    def have_changed(self) -> bool:
        """Whether the first evaluation replaced, added or removed a tensor."""
        return bool(self._changed)

    @property
    def matter(self) -> bool:
        """Whether the second evaluation depends on any of the attributes."""
        return bool(self._changed or self._switches)


def give_back(held: list[Held]) -> None:
    """Restore the attributes that `Attributes.lend` changed."""
    for fill, holder, now in reversed(held):
        fill(holder, now)


def _switches_of(holder: Any) -> Contents:
    """The switches among a holder's contents."""
    now = contents(holder)
    if is_container(holder):
        return now if now and all(isinstance(value, _SWITCHES) for value in now.values()) else {}
    return {n: v for n, v in now.items() if isinstance(v, _SWITCHES) or (is_container(v) and _switches_of(v))}


def _is_switched(now: Any, then: Any) -> bool:
    return now is not then and (is_container(then) or now != then)


def _tensors_differ(before: Contents, after: Contents) -> bool:
    """Whether a tensor, or a holder of tensors, was added, removed or replaced."""
    names = [n for n in before.keys() | after.keys() if before.get(n, ABSENT) is not after.get(n, ABSENT)]
    return any(next(tensors_in(held.get(n), ""), None) is not None for n in names for held in (before, after))


def _is_derived(holder: Any, name: str) -> bool:
    """Whether a hook of torch.nn.utils computes this attribute before each call, as the older `weight_norm` does `weight`."""
    return isinstance(holder, nn.Module) and any(
        getattr(hook, "name", None) == name for hook in holder._forward_pre_hooks.values()
    )
