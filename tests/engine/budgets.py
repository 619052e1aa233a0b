"""Sequences with a memory budget."""

import warnings

import torch

import revflow
from engine.nets import additive
from revflow._budget.costs import SequenceMenu
from revflow._budget.step_costs import StepMenu

HUGE = 2**40


def of(*blocks, budget=HUGE, **options):
    torch.manual_seed(0)
    return revflow.ReversibleSequence(blocks, memory_budget=budget, guard="off", **options).double()


def sequence(make=additive, depth=4, **options):
    return of(*[make() for _ in range(depth)], **options)


def train(net, x):
    net(x).sum().backward()


def between(net, x, share):
    """A budget of which so much is used for blocks that are kept."""
    net.memory_budget = "max"
    most = net.plan(x).peak
    net.memory_budget = "min"
    least = net.plan(x).peak
    net.memory_budget = int(least + share * (most - least))
    return net


def range_of(training):
    """The lowest and the highest peak that are planned for the step `training(budget)`, which uses that budget."""
    peaks = []
    for limit in (0, HUGE):
        budget = revflow.Budget(limit)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            training(budget)()
            peaks.append(budget.plan.peak)
    return tuple(peaks)


def transient_of(budget):
    """The largest possible error of a plan's peak: the temporary memory that recomputes one block or time step."""
    menus = [known.menu for known in budget._keeper._menus.values()]
    of_blocks = [cost.transient for menu in menus if isinstance(menu, SequenceMenu) for cost in menu.costs]
    of_steps = [menu.least.peak - menu.least.held for menu in menus if isinstance(menu, StepMenu)]
    return max(of_blocks + of_steps)
