"""Measured costs and orders as plain values, for a checkpoint."""

from __future__ import annotations

from typing import Any

from revflow._budget.costs import Cost, Menu, SequenceMenu
from revflow._budget.step_costs import CellCost, Handling, Inputs, StepMenu


def saved(menu: Menu) -> list[Any]:
    """The measured costs of a call."""
    return [menu.unit, *menu.measured]


def restored(values: list[Any]) -> Menu:
    """The menu of which `saved` made these values."""
    unit, costs, *rest = values
    if unit == SequenceMenu.unit:
        return SequenceMenu([Cost(*cost) for cost in costs], *rest)
    inputs, handling = rest
    return StepMenu([CellCost(*cost) for cost in costs], Inputs(*inputs), Handling(*handling))
