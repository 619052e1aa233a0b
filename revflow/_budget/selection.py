"""The plan of one training step: an option for each of its calls, so that their peak stays within the budget.

The backward pass runs through the calls in reverse order. While it runs through one call, the bytes that all earlier calls hold
are still alive. A budget buys saved work per byte, where a byte saves most. The candidates do not depend on the budget, which
only chooses among them. Hence a larger budget never leads to more work, and a smaller one never to a higher peak, as long as
any plan fits it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from revflow._budget.costs import Menu, Option


class Selection(NamedTuple):
    """The options of a step's calls, in the order in which the calls run."""

    options: tuple[Option, ...]
    peak: int
    """Expected bytes of activations and their gradients."""
    spared: int
    """Work of second evaluations that is saved, compared with recomputing everything."""


def planned(menus: Sequence[Menu], available: int) -> Selection:
    """The plan that saves the most work within the available bytes; the one that recomputes everything if none fits.

    No plan is expected to take less than recomputing everything. Storing a very short sequence may take less than inverting it,
    but then the peak would rise as soon as the budget falls below the need.
    """
    carried = max(menu.carried for menu in menus)
    least, last = _least(menus), menus[-1]
    if available < least.peak:
        return least
    peaks = [option.peak for option in last.by_peak]
    found = [least]
    for options, peak, held, spared in _states(menus[:-1]):
        number = bisect_right(peaks, available - carried - held) - 1
        if carried + peak <= available and number >= 0:
            option = last.by_peak[number]
            total = max(carried + peak, carried + held + option.peak, least.peak)
            found.append(Selection((*options, option), total, spared + option.spared))
    return max(found, key=lambda plan: (plan.spared, -plan.peak))


def _least(menus: Sequence[Menu]) -> Selection:
    options = tuple([menu.least for menu in menus])
    return Selection(options, max(menu.carried for menu in menus) + _peak(options), 0)


def _peak(options: Sequence[Option]) -> int:
    peak = held = 0
    for option in options:
        peak = max(peak, held + option.peak)
        held += option.held
    return peak


_MOST_STATES = 500
"""States of the earlier calls that are compared, without those that fill a gap."""

Upgrade = tuple[int, Option, Option]
"""A call, its option, and its next one."""


class _State:
    """The options of the earlier calls."""

    def __init__(self, options: list[Option]) -> None:
        self.options = options
        self.held, self.spared = sum([o.held for o in options]), sum([o.spared for o in options])

    def take(self, upgrade: Upgrade) -> bool:
        """Upgrade a call; False if the call has not reached the upgrade's first option."""
        call, old, new = upgrade
        if self.options[call] is not old:
            return False
        self.options[call] = new
        self.held, self.spared = self.held + new.held - old.held, self.spared + new.spared - old.spared
        return True

    @property
    def candidate(self) -> tuple[tuple[Option, ...], int, int, int]:
        return tuple(self.options), _peak(self.options), self.held, self.spared


def _states(menus: Sequence[Menu]) -> Iterator[tuple[tuple[Option, ...], int, int, int]]:
    """From recomputing everything to storing all: the options of the earlier calls, their peak, held bytes and saved work.

    From one state to the next, one call takes its next option, in the order of the work that this saves per byte. Of equal
    ones, the last call is the first: the backward pass begins there, and frees what the call holds. Before a large upgrade,
    smaller ones fill the gap that remains if the large one does not fit.
    """
    state = _State([menu.by_held[0] for menu in menus])
    upgrades = [(c, a, b) for c in reversed(range(len(menus))) for a, b in pairwise(menus[c].by_held)]
    upgrades.sort(key=lambda u: (u[1].spared - u[2].spared) / (u[2].held - u[1].held))
    yield state.candidate
    every = 1 + len(upgrades) // _MOST_STATES
    large = sum([b.held - a.held for _, a, b in upgrades]) / _LARGE
    for number, upgrade in enumerate(upgrades):
        if upgrade[2].held - upgrade[1].held > large:
            yield from _filled(state, upgrades[number:])
        state.take(upgrade)
        if number % every == 0 or number == len(upgrades) - 1:
            yield state.candidate


_LARGE = 30
"""An upgrade is large if it takes more than one of so many parts of all upgrades' bytes."""


def _filled(state: _State, upgrades: Sequence[Upgrade]) -> Iterator[tuple[tuple[Option, ...], int, int, int]]:
    """States with further upgrades that are smaller than the first one."""
    limit = upgrades[0][2].held - upgrades[0][1].held
    state, every = _State([*state.options]), 1 + len(upgrades) // (_MOST_STATES // _LARGE)
    for number, upgrade in enumerate(u for u in upgrades if u[2].held - u[1].held < limit):
        if state.take(upgrade) and number % every == 0:
            yield state.candidate
