"""Sequences with a memory budget."""

import torch

import revflow
from engine.nets import additive

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
