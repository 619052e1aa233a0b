"""Two threads: gradients, statistics and random numbers are those of one thread."""

import copy

import pytest
import torch
from torch import nn

import revflow
from engine.against_plain import Body, chain, recurrence, through_time
from engine.threads import Slow, gradients_of, in_threads, inputs

STEPS = 8


def body(*layers):
    return lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), Slow(), *[layer() for layer in layers], nn.Linear(6, 4))


KINDS = {
    "linear": body(),
    "batch norm": body(lambda: nn.BatchNorm1d(6)),
    "own": lambda: nn.Sequential(Body(), Slow()),
    "known layers": lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 4)),
}


@pytest.mark.parametrize("hooks", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_one_network_is_trained_in_two_threads(kind, hooks):
    net = chain(KINDS[kind])
    twin = copy.deepcopy(net)
    if hooks:
        for p in net.parameters():
            p.register_hook(lambda g: g * 1)
    expected = [gradients_of(twin, inputs(k)) for k in (0, 1)]
    found = {0: [], 1: []}
    in_threads(*[lambda k=k: [found[k].append(gradients_of(net, inputs(k))) for _ in range(STEPS)] for k in (0, 1)])
    for k, its in found.items():
        for gradients in its:
            for f, e in zip(gradients, expected[k], strict=True):
                torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-9)
    counts = [b for name, b in net.named_buffers() if name.endswith("num_batches_tracked")]
    assert all(count == 2 * STEPS for count in counts)


def test_dropout_in_two_networks():
    """Each mask is the same in both evaluations: a gradient of the loss that was computed, by finite differences of it."""
    nets = [chain(body(lambda: nn.Dropout(0.5)), exact=revflow.Grid(30)) for _ in range(2)]
    in_threads(*[lambda k=k: [gradients_of(nets[k], inputs(k)) for _ in range(STEPS)] for k in (0, 1)])


@pytest.mark.parametrize("states", ["kept", 2])
def test_dropout_in_two_recurrences(states):
    nets = [recurrence(body(lambda: nn.Dropout(0.5)), states) for _ in range(2)]
    in_threads(*[lambda k=k: [through_time()(nets[k]).backward() for _ in range(STEPS)] for k in (0, 1)])


def test_a_network_is_trained_while_a_copy_of_it_is_evaluated():
    net = chain(KINDS["batch norm"])
    copied, x = copy.deepcopy(net).eval(), inputs(0)
    expected = copied(x)
    found = []

    def evaluate():
        with torch.no_grad():
            found.extend(copied(x) for _ in range(STEPS))

    in_threads(lambda: [gradients_of(net, inputs(1)) for _ in range(STEPS)], evaluate)
    for y in found:
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("states", ["kept", 2])
def test_one_recurrence_is_trained_in_two_threads(states):
    net = recurrence(Body, states)
    twin, losses = copy.deepcopy(net), [through_time(steps=3), through_time(steps=4)]
    for loss_of in losses * 3:
        with revflow.ordinary_autograd():
            loss = loss_of(twin)
        loss.backward()
    in_threads(*(lambda loss_of=loss_of: [loss_of(net).backward() for _ in range(3)] for loss_of in losses))
    for found, expected in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-9, atol=1e-9)
