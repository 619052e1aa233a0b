"""memory_budget in other modes, in threads, and in other modules."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

import revflow
from engine.budgets import between, sequence, train
from engine.nets import (
    additive,
    additive_two,
    affine,
    assert_close,
    assert_same_gradients,
    conditioners,
    gated,
    image,
    weighted,
)

HUGE = 2**40


class Plain(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net.plain(x)


def test_functional_call():
    net, x = sequence(), image().requires_grad_()
    between(net, x, 0.5)
    own = {name: 2 * p.detach() for name, p in net.named_parameters()}
    own = {name: p.requires_grad_() for name, p in own.items()}
    expected = functional_call(Plain(net), {f"net.{name}": p for name, p in own.items()}, x)
    expected = torch.autograd.grad(weighted(expected), [x, *own.values()])
    for _ in range(3):
        assert_close(torch.autograd.grad(weighted(functional_call(net, own, x)), [x, *own.values()]), expected)


@pytest.mark.parametrize("measured", [False, True])
def test_where_nothing_is_rebuilt_nothing_is_counted(measured):
    net, x = sequence(), image()
    if measured:
        net.plan(x)
    y = net.plain(x)
    with torch.no_grad():
        assert torch.equal(net(x), y)
    with torch.inference_mode():
        assert torch.equal(net(x), y)
    assert_close([grad(lambda x: weighted(net(x)))(x)], [grad(lambda x: weighted(net.plain(x)))(x)])
    assert_close([vmap(lambda s: net(s[None])[0])(x)], [y])
    assert_close(jvp(net, (x,), (x,)), jvp(net.plain, (x,), (x,)))
    with torch.autograd.forward_ad.dual_level():
        net(torch.autograd.forward_ad.make_dual(x, x))
    assert_close([torch.export.export(net, (x,)).module()(x)], [y])
    assert net._keeper.in_use == 0
    assert len(net._keeper._menus) == measured


def test_anomaly_mode_autocast_and_double_backward():
    net, x = sequence(), image().requires_grad_()
    for _ in range(2):
        with torch.autograd.detect_anomaly(check_nan=True):
            assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [x])
    first, plain = (torch.autograd.grad(f(x).pow(3).sum(), x, create_graph=True)[0] for f in (net, net.plain))
    assert_close(*(torch.autograd.grad(g.square().sum(), [x, *net.parameters()]) for g in (first, plain)))
    assert net._keeper.in_use == 0
    net.float()
    x = image(dtype=torch.float32).requires_grad_()
    for low in (False, True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            train(net, x)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)
    assert len(net._keeper._menus) == 3  # float64, float32, autocast
    y.sum().backward()


@pytest.mark.parametrize("budget", [30_000, 60_000, HUGE])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.filterwarnings("ignore:memory_budget")
def test_predicted_peaks_are_those_that_are_tracked(budget, steps):
    def run():
        torch.manual_seed(0)
        blocks = [additive(), gated(), revflow.PixelUnshuffle(2), affine(16)]
        net, x = revflow.ReversibleSequence(blocks, memory_budget=budget), torch.randn(2, 8, 14, 10)
        for _ in range(steps):
            train(net, x)

    tracked, predicted = revflow.measure_memory(run), revflow.measure_memory(run, predict=True)
    assert tracked.peak == predicted.peak


def test_two_threads_with_copies():
    net = sequence(additive_two)
    nets, found = [net, copy.deepcopy(net)], [None, None]

    def work(k):
        x = image().requires_grad_()
        for _ in range(10):
            weighted(nets[k](x)).backward()
        found[k] = x.grad

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    x = image().requires_grad_()
    assert_close(found, 2 * [10 * torch.autograd.grad(weighted(net.plain(x)), x)[0]])
    assert [n._keeper.in_use for n in nets] == [0, 0]


def test_parametrizations():
    net, x = sequence(), image().requires_grad_()
    for c in conditioners(net):
        torch.nn.utils.parametrizations.weight_norm(c.first)
    between(net, x, 0.6)
    for _ in range(3):
        assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [x])


class Cell(revflow.RecurrentCell):
    """Its update is a sequence with a budget."""

    def __init__(self, chain):
        super().__init__()
        self.chain = chain

    def update(self, streams, state, memory, context):
        return (torch.tanh(state[0] + self.chain(streams[0])),), memory

    def mix(self, streams, state, context):
        return (streams[0] + state[0],)


def test_in_the_cells_of_a_recurrence():
    torch.manual_seed(0)
    net = revflow.ReversibleRecurrence([Cell(sequence()) for _ in range(2)]).double()
    x, wanted = image().requires_grad_(), list(net.parameters())
    zero = revflow.RecurrentState(((torch.zeros_like(x),),) * 2, ((),) * 2)

    def run(step):
        streams, state = (x,), zero
        for _ in range(3):
            streams, state = step(streams, state)
        return streams[0]

    expected = torch.autograd.grad(weighted(run(net.plain_step)), [x, *wanted])
    for _ in range(2):
        assert_close(torch.autograd.grad(weighted(run(net.step)), [x, *wanted]), expected)
    assert [cell.chain._keeper.in_use for cell in net] == [0, 0]
