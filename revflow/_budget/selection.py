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
    """The plan that saves the most work within the available bytes; the one that recomputes everything if none fits."""
    carried = max(menu.carried for menu in menus)
    least, last = _least(menus), menus[-1]
    peaks = [option.peak for option in last.by_peak]
    found = [least] if least.peak <= available else []
    for options, peak, held, spared in _states(menus[:-1]):
        number = bisect_right(peaks, available - carried - held) - 1
        if carried + peak <= available and number >= 0:
            option = last.by_peak[number]
            total = carried + max(peak, held + option.peak)
            found.append(Selection((*options, option), total, spared + option.spared))
    return max(found, key=lambda plan: (plan.spared, -plan.peak), default=least)


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
"""States of the earlier calls that are compared."""


def _states(menus: Sequence[Menu]) -> Iterator[tuple[tuple[Option, ...], int, int, int]]:
    """From recomputing everything to storing all: the options of the earlier calls, their peak, held bytes and saved work.

    From one state to the next, one call takes its next option, in the order of the work that this saves per byte. Of equal
    ones, the last call is the first: the backward pass begins there, and frees what the call holds.
    """
    options = [menu.by_held[0] for menu in menus]
    upgrades = [(c, a, b) for c in reversed(range(len(menus))) for a, b in pairwise(menus[c].by_held)]
    upgrades.sort(key=lambda u: (u[1].spared - u[2].spared) / (u[2].held - u[1].held))
    held, spared = sum(o.held for o in options), sum(o.spared for o in options)
    yield tuple(options), _peak(options), held, spared
    every = 1 + len(upgrades) // _MOST_STATES
    for number, (c, a, b) in enumerate(upgrades, 1):
        options[c] = b
        held, spared = held + b.held - a.held, spared + b.spared - a.spared
        if number % every == 0 or number == len(upgrades):
            yield tuple(options), _peak(options), held, spared
