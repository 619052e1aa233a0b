"""What a first step has found does not hold for ever: conditioners and parameters change between steps."""

import pytest
import torch
from torch import nn

from engine.against_plain import Body, assert_right, chain, frames, recurrence, squared, through_time


class Tied(Body):
    """Uses a module that it holds without registering it."""

    def __init__(self, other):
        super().__init__()
        self.others = [other]

    def forward(self, x):
        return super().forward(x) @ self.others[0].weight


def freeze(module, frozen=True):
    return module.requires_grad_(not frozen)


def test_an_unregistered_weight_that_is_unfrozen_later_is_refused_then():
    other, x = freeze(nn.Linear(4, 4)).double(), frames()
    net = chain(lambda: Tied(other))
    for _ in range(4):
        net(x).sum().backward()
    freeze(other, False)
    with pytest.raises(RuntimeError, match=r"block 2 .*shape \(4, 4\) \(Tied\.others\[0\]\.weight\).*Register it"):
        net(x).sum().backward()
    freeze(other)
    assert_right(net, squared(x), [x])


def test_a_conditioner_that_is_replaced_after_steps():
    x, net, stranger = frames(), chain(Body), nn.Parameter(torch.ones(4, dtype=torch.float64))
    for _ in range(3):
        net(x).sum().backward()
    net[1].F = Body().double()
    assert_right(net, squared(x), [x])

    class Closing(Body):
        def forward(self, x):
            return super().forward(x) * stranger

    net[1].F = Closing().double()
    with pytest.raises(RuntimeError, match=r"block 1 .*shape \(4,\).*Register it"):
        net(x).sum().backward()


def test_a_layer_that_is_replaced_deep_inside():
    x, net, kept = frames(), chain(Body), []
    for _ in range(4):
        net(x).sum().backward()
    net[1].F.first = nn.Sequential(net[1].F.first, nn.Identity())
    net[1].F.first[1].register_forward_hook(lambda m, i, o: kept.append(o))
    with pytest.raises(RuntimeError, match=r"block 1 .*still held"):
        net(x).sum().backward()


def test_parameters_that_are_frozen_and_unfrozen():
    x, net = frames(), chain(Body)
    for frozen in (False, True, False):
        freeze(net[1], frozen)
        assert_right(net, squared(x), [x])


@pytest.mark.parametrize("states", ["kept", 2])
def test_a_recurrence_whose_tied_weight_is_unfrozen_later(states):
    other = freeze(nn.Linear(4, 4)).double()
    net, loss_of = recurrence(lambda: Tied(other), states), through_time()
    assert_right(net, loss_of, steps=3)
    freeze(net[0].body.others[0], False)
    with pytest.raises(RuntimeError, match=r"cell \d .*Tied\.others\[0\]\.weight|cell \d .*others\[0\]\.weight"):
        loss_of(net).backward()


def replica_of(module):
    """As torch.nn.parallel.replicate makes them on GPUs: parameters are plain attributes that have a graph."""
    twin = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        twin._modules[name] = None if child is None else replica_of(child)
    for name, parameter in module._parameters.items():
        twin._parameters[name] = None
        if parameter is not None:
            del twin._parameters[name]
            object.__setattr__(twin, name, parameter * 1)
    return twin


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("options", [{}, {"memory_budget": 10**6}, {"chunks": 2}], ids=str)
def test_replicas_of_data_parallel_are_refused_by_name(steps, options):
    x, net = frames(), chain(Body, **options)
    for _ in range(steps):
        net(x).sum().backward()
    holder = nn.Sequential(nn.Identity(), net)
    with pytest.raises(RuntimeError, match=r"replica of torch\.nn\.DataParallel.*DistributedDataParallel"):
        replica_of(holder)(x)
    with torch.no_grad():
        torch.testing.assert_close(replica_of(holder)(x), net(x))


def test_replicas_of_a_recurrence():
    with pytest.raises(RuntimeError, match=r"ReversibleRecurrence is a replica of torch\.nn\.DataParallel"):
        through_time()(replica_of(recurrence(Body)))
