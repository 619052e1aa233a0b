"""Tensors and switches that modules hold outside of parameters and buffers, and tensors that keyword arguments lead to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import Any, NamedTuple

from torch import Tensor, nn

from revflow._replay.holders import (  # fmt: skip
    ABSENT,
    INTERNAL,
    Contents,
    all_tensors,
    contents,
    holders_in,
    is_container,
    is_holder,
    named,
    put,
    refill,
    tensors_in,
)

_SWITCHES = (bool, str, type(None), Enum)


Held = tuple[Callable[[Any, Contents], None], Any, Contents]
"""How to give a holder its contents back."""


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
        roots = [m for m in modules if len(m.__dict__) > len(INTERNAL)]
        self._bare = [m for m in modules if len(m.__dict__) <= len(INTERNAL)]
        """Modules without attributes of their own."""
        self._held = [(place, h, contents(h)) for place, h in holders_in(roots) if not isinstance(h, tuple)]
        self._versions = [
            (f"{place}{named(holder, name)}", value, value._version)
            for place, holder, held in self._held
            for name, value in held.items()
            if isinstance(value, Tensor) and not value.is_inference()
        ]
        self._changed: list[Changed] = []
        self._moved: list[tuple[Contents, Any]] = []
        self._switches: list[tuple[Any, Contents]] = []

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
            if len(module.__dict__) > len(INTERNAL) and _tensors_differ({}, contents(module)):
                self._changed.append(Changed(type(module).__name__, module, {}))
        self._switches = [(h, found) for _, h, _ in self._held if (found := _switches_of(h))]
        self._held, self._versions = [], []

    def lend(self) -> list[Held]:
        """Put everything as the first evaluation saw it; returns what `give_back` needs.

        Switches (booleans, strings, None, and lists of them) are as they were when it ended: an initialisation is not repeated.
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
        """The tensors in whose place the first evaluation put others; taken out, for autograd to save."""
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
        """Bring back what `moved` has taken out."""
        for (before, name), value in zip(self._moved, moved, strict=True):
            before[name] = value

    def escaped(self) -> list[str]:
        """Places in which the second evaluation has left tensors of its graph."""
        return [
            place
            for where, holder, before in self._changed
            for name, value in contents(holder).items()
            if value is not before.get(name, ABSENT) and not _is_derived(holder, name)
            for place, tensor in tensors_in(value, f"{where}{named(holder, name)}")
            if tensor.requires_grad
        ]

    def switches(self) -> tuple[object, ...]:
        """Their values when the first evaluation ended, as something that can be compared."""
        values = [value for _, switches in self._switches for value in switches.values()]
        return tuple([repr(value) if is_container(value) else value for value in values])

    @property
    def matter(self) -> bool:
        """Whether the second evaluation needs them."""
        return bool(self._changed or self._switches)


def give_back(held: list[Held]) -> None:
    for fill, holder, now in reversed(held):
        fill(holder, now)


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
    return any(map(is_holder, context.values()))


def _with_versions(context: dict[str, Any]) -> dict[str, tuple[Tensor, int]]:
    return {
        place: (tensor, 0 if tensor.is_inference() else tensor._version)
        for name, value in context.items()
        for place, tensor in all_tensors({name: value})
    }


def _switches_of(holder: Any) -> Contents:
    """What in it may choose between ways of computing."""
    now = contents(holder)
    if is_container(holder):
        return now if now and all(isinstance(value, _SWITCHES) for value in now.values()) else {}
    return {n: v for n, v in now.items() if isinstance(v, _SWITCHES) or (is_container(v) and _switches_of(v))}


def _is_switched(now: Any, then: Any) -> bool:
    return now is not then and (is_container(then) or now != then)


def _tensors_differ(before: Contents, after: Contents) -> bool:
    """Whether a tensor, or something that holds tensors, came, went or was replaced."""
    names = [n for n in before.keys() | after.keys() if before.get(n, ABSENT) is not after.get(n, ABSENT)]
    return any(next(tensors_in(held.get(n), ""), None) is not None for n in names for held in (before, after))


def _is_derived(holder: Any, name: str) -> bool:
    """Whether a hook of torch.nn.utils computes this attribute before each call: `weight` under the older `weight_norm`."""
    return isinstance(holder, nn.Module) and any(
        getattr(hook, "name", None) == name for hook in holder._forward_pre_hooks.values()
    )
