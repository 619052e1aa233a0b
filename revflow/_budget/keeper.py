"""The memory budget at work: it recognizes the calls of a training step, and gives each call its share.

A step begins when no call is pending. Calls are known by their kind, and steps by the order of their pending calls. The first
call of a new kind recomputes everything, and its costs are measured on the way. An order that was not met before recomputes
everything from the point where it differs from all known ones. Later steps of the same order follow its plan.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Hashable, Sequence
from itertools import accumulate, count
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from revflow._base.free_memory import free_memory
from revflow._base.memory_size import MemoryBudget, parse, size
from revflow._base.torch_private import hooks_saved_tensors
from revflow._base.user_warnings import warn
from revflow._budget.costs import Choice, Menu, Option
from revflow._budget.saved_costs import restored, saved
from revflow._budget.selection import Selection, planned

_log = logging.getLogger("revflow.budget")

_MOST_KINDS, _MOST_ORDERS = 1024, 64
"""Kinds of calls and orders that are remembered. A further one replaces the oldest, which is learned again if it returns."""

M = TypeVar("M", bound=Menu, covariant=True)

Order = tuple[int, ...]
"""The kinds of the calls of a step, each by its number."""


class BudgetedCall(Protocol[M]):
    """The interface through which a budget runs one call of a module."""

    @property
    def kind(self) -> Hashable:
        """All that determines the costs: calls of equal kinds have equal costs."""

    @property
    def fingerprint(self) -> str:
        """As `kind`, in a text that is the same in another process."""

    @property
    def label(self) -> str:
        """The call's name in a printed plan."""

    @property
    def device(self) -> torch.device: ...

    def run(self, choice: Choice | None = None, lifetime: Tensor | None = None) -> Any:
        """Run the call; None recomputes everything. The graph holds `lifetime` until it is freed."""

    def measured(self, lifetime: Tensor | None = None) -> tuple[Any, M]:
        """The result of `run(None, lifetime)`, and the options that were measured on the way."""


class Measured(NamedTuple):
    """The measured options of a kind of call, and its names."""

    label: str
    fingerprint: str
    menu: Menu


class Learned(NamedTuple):
    """The plan of an order."""

    plan: Selection
    held: tuple[int, ...]
    """Bytes that are held before each call."""


class Keeper:
    """The memory budget of one module or of several, with the costs measured so far and the bytes in use."""

    def __init__(self, given: MemoryBudget, warn: bool = True) -> None:
        self.given = given
        self._limit = parse(given)
        self._bytes = self._limit if isinstance(self._limit, int) else None
        """The limit in bytes; None until it is known."""
        self._numbers: dict[Hashable, int] = {}
        """The number of each kind of call."""
        self._menus: dict[int, Measured] = {}
        """By kind: what was measured."""
        self._restored: dict[str, list[int]] = {}
        """By fingerprint: the kinds of a loaded state that no call has had yet."""
        self._orders: dict[Order, Learned | None] = {}
        """Orders of which none begins with another one; None until an order is planned."""
        self._pending: dict[object, tuple[int, int]] = {}
        """The kind and the held bytes of each call whose graph has not been freed, in the order of the calls."""
        self._warned = not warn

    def __getstate__(self) -> dict[str, object]:
        # A copy of the modules has no graphs, and its calls have not been measured.
        return {**self.__dict__, "_numbers": {}, "_menus": {}, "_restored": {}, "_orders": {}, "_pending": {}}

    @property
    def is_limited(self) -> bool:
        """Whether what is stored depends on its costs: the budget is neither "min" nor "max"."""
        return not isinstance(self._limit, str)

    @property
    def stores_all(self) -> bool:
        """Whether standard autograd runs everything: the budget is "max"."""
        return self._limit == "max"

    @property
    def in_use(self) -> int:
        """Bytes that the graphs of all pending calls hold."""
        return sum([held for _, held in [*self._pending.values()]])

    def run(self, call: BudgetedCall[Menu]) -> Any:
        """The result of the call, which stores what the plan of the step allows."""
        if hooks_saved_tensors():
            # The hooks decide where tensors are stored, so their memory is unknown. torch.utils.checkpoint also requires that
            # both of its runs save the same tensors.
            return call.run()
        kind, lifetime = self._number(call), torch.empty(0)
        order = (*[pending for pending, _ in [*self._pending.values()]], kind)
        if kind in self._menus:
            option = self._option(order, call.device)
            result = call.run(option.choice, lifetime)
        else:
            label, fingerprint = call.label, call.fingerprint  # before the run, which frees the call's inputs
            result, menu = call.measured(lifetime)
            self._learn(kind, Measured(label, fingerprint, menu))
            option = menu.least
        self._note(order)
        self._count(kind, option.held, lifetime)
        return result

    def plan_of(self, call: BudgetedCall[M]) -> tuple[int | None, M, Option]:
        """The limit in bytes, the options, and the one that is chosen, of a step with only such a call."""
        kind, label, fingerprint, device = self._number(call), call.label, call.fingerprint, call.device
        _, menu = call.measured()
        if isinstance(self._limit, str):
            return None, menu, menu.most if self.stores_all else menu.least
        self._learn(kind, Measured(label, fingerprint, menu))
        self._note((kind,))
        limit = self._limit_on(device)
        return limit, menu, planned([menu], limit).options[0]

    @property
    def step(self) -> tuple[int, list[tuple[str, Menu, Option]], Selection] | None:
        """The limit in bytes, the calls, and the plan of the longest step so far; None before the first one."""
        order = max(self._orders, key=len, default=None)
        if order is None or self._bytes is None:
            return None
        plan = self._planned(order, self._bytes).plan
        known = [self._menus[kind] for kind in order]
        return self._bytes, [(m.label, m.menu, o) for m, o in zip(known, plan.options, strict=True)], plan

    def state(self) -> dict[str, Any]:
        """The limit, the measured costs and the orders, as plain values."""
        return {
            "limit": self._bytes,
            "kinds": [[kind, m.label, m.fingerprint, saved(m.menu)] for kind, m in self._menus.items()],
            "orders": [*map(list, self._orders)],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a state. A limit in bytes that was given explicitly stays."""
        if not isinstance(self._limit, int):
            self._bytes = state["limit"]
        numbers = {kind: next(_counter) for kind, *_ in state["kinds"]}
        self._numbers, self._restored, self._menus = {}, {}, {}
        for kind, label, fingerprint, values in state["kinds"]:
            self._menus[numbers[kind]] = Measured(label, fingerprint, restored(values))
            self._restored.setdefault(fingerprint, []).append(numbers[kind])
        self._orders = {tuple([numbers[kind] for kind in order]): None for order in state["orders"]}

    def _number(self, call: BudgetedCall[Menu]) -> int:
        """The number of the call's kind."""
        kind = call.kind
        number = self._numbers.get(kind)
        if number is None:
            loaded = self._restored.get(call.fingerprint) if self._restored else None
            number = self._numbers[kind] = loaded.pop(0) if loaded else next(_counter)
        return number

    def _learn(self, kind: int, measured: Measured) -> None:
        """Remember the options of a kind of call."""
        if len(self._menus) == _MOST_KINDS:
            oldest = next(iter(self._menus))
            del self._menus[oldest]
            self._numbers = {k: n for k, n in self._numbers.items() if n != oldest}
            self._orders = {order: found for order, found in self._orders.items() if oldest not in order}
        self._menus[kind] = measured

    def _note(self, order: Order) -> None:
        """Remember an order, which replaces those that it continues."""
        if any([known[: len(order)] == order for known in self._orders]):
            return
        self._orders = {known: plan for known, plan in self._orders.items() if order[: len(known)] != known}
        if len(self._orders) == _MOST_ORDERS:
            del self._orders[next(iter(self._orders))]
        self._orders[order] = None

    def _option(self, order: Order, device: torch.device) -> Option:
        """The option of the last call of an order, which may continue."""
        menu = self._menus[order[-1]].menu
        number, limit = len(order) - 1, self._limit_on(device)
        learned = [self._planned(known, limit) for known in self._orders if known[: len(order)] == order]
        # More is held than planned if an earlier call followed the plan of another order.
        if not learned or self.in_use > min([plan.held[number] for plan in learned]):
            return menu.least
        # Of several continuations the one that holds the least: it leaves enough memory for the calls of all others.
        return min([known.plan.options[number] for known in learned], key=lambda option: option.held)

    def _planned(self, order: Order, limit: int) -> Learned:
        learned = self._orders[order]
        if learned is None:
            menus = [self._menus[kind].menu for kind in order]
            plan = planned(menus, limit)
            held = accumulate([option.held for option in plan.options], initial=0)
            learned = self._orders[order] = Learned(plan, tuple(held))
            _log.info("memory_budget=%r: %s", self.given, summary(menus, plan))
            self._warn_if_too_small(limit, planned(menus, 0).peak)
        return learned

    def _limit_on(self, device: torch.device) -> int:
        """The limit in bytes; a share is taken of the memory that is free at the first call."""
        if self._bytes is None:
            assert isinstance(self._limit, float)
            self._bytes = int(self._limit * free_memory(device))
        return self._bytes

    def _warn_if_too_small(self, limit: int, least: int) -> None:
        if limit < least and not self._warned:
            self._warned = True
            warn(
                f"memory_budget={self.given!r} is too small: a training step on such inputs needs at least {size(least)}, and "
                f"exceeds the budget. Reduce the batch size, or set chunks=n. (Shown once per budget.)",
                UserWarning,
            )

    def _count(self, kind: int, held: int, lifetime: Tensor) -> None:
        """Count the call as pending until `lifetime` is freed, which its graph holds."""
        call = object()
        self._pending[call] = kind, held
        weakref.finalize(lifetime, self._pending.pop, call).atexit = False


_counter = count()


def summary(menus: Sequence[Menu], plan: Selection) -> str:
    """The plan in one line."""
    parts = [menu.parts(option.choice) for menu, option in zip(menus, plan.options, strict=True)]
    stored, outputs, of = map(sum, zip(*parts, strict=True))
    more = f", outputs of {outputs} more" if outputs else ""
    units = " and ".join(dict.fromkeys(f"{menu.unit}s" for menu in menus))
    calls = f" in {len(menus)} calls" if len(menus) > 1 else ""
    return f"{stored} of {of} {units} stored{more}{calls}, expected peak {size(plan.peak)}"
