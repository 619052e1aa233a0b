"""Hooks of parameters that come, go and follow each other, while saved tensors are packed: as under standard autograd."""

import copy
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

import revflow
from engine.against_plain import Body, Cell, Halved, chain, frames, through_time


def copies():
    return saved_tensors_hooks(lambda t: (t.clone(), t.shape), lambda held: held[0].view(held[1]))


@contextmanager
def both():
    with save_on_cpu(), copies():
        yield


WAYS = {"save_on_cpu": save_on_cpu, "own hooks": copies, "both": both, "checkpoint": None}
ways = pytest.mark.parametrize("way", WAYS)


def forward(way, net, loss_of, plain):
    """The loss, with its graph saved in this way."""
    with revflow.ordinary_autograd() if plain else nullcontext():
        if plain or WAYS[way] is None:
            return loss_of(net) if plain else checkpoint(loss_of, net, use_reentrant=False)
        with WAYS[way]():
            return loss_of(net)


class Log:
    """Hooks on all parameters, which note the names of those that they saw."""

    def __init__(self, net, hook):
        self.names, self.handles = [], []
        for name, p in net.named_parameters():
            self.handles.append(p.register_hook(partial(self.see, name, hook)))

    def see(self, name, hook, gradient):
        self.names.append(name)
        return hook(gradient)

    def remove(self):
        for handle in self.handles:
            handle.remove()


def assert_same(net, twin, logs=()):
    for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    for mine, others in logs:
        assert sorted(mine.names) == sorted(others.names)


def scaled(g):
    return 3 * g.clamp(-0.2, 0.2)


def squares(x, **context):
    return lambda net: net(x, **context).square().sum()


def affine_two(**options):
    torch.manual_seed(3)
    couplings = [revflow.AffineCoupling(Halved(Body(8)), Halved(Body(8))) for _ in range(2)]
    return revflow.ReversibleSequence(couplings, split_dim=-1, **options).double()


class Shear(revflow.Bijection):
    """A block of one's own."""

    def __init__(self):
        super().__init__()
        self.inner = Body()

    def forward(self, x1, x2):
        return x1, x2 + self.inner(x1)

    def inverse(self, y1, y2):
        return y1, y2 - self.inner(y1)


class Outer(Body):
    """A sequence inside of a conditioner."""

    def __init__(self, outputs=4):
        super().__init__(outputs)
        self.inner = revflow.ReversibleSequence([revflow.GatedCoupling(Halved(nn.Linear(3, 6)))], split_dim=-1)

    def forward(self, x):
        return self.last(self.inner(torch.tanh(self.first(x))))


class Checkpointed(Body):
    def forward(self, x):
        return self.last(checkpoint(lambda t: torch.tanh(self.first(t)), x, use_reentrant=False))


def normed():
    return nn.Sequential(weight_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 4))


NETS = {
    "two conditioners": affine_two,
    "two conditioners, chunks": lambda: affine_two(chunks=3),
    "two conditioners, exact": lambda: affine_two(exact=revflow.Grid(30)),
    "two conditioners, budget": lambda: affine_two(memory_budget="2kB"),
    "blocks of one's own": lambda: revflow.ReversibleSequence([Shear(), Shear()], split_dim=-1).double(),
    "a sequence inside": lambda: chain(Outer),
    "a checkpoint inside": lambda: chain(Checkpointed),
    "weight_norm": lambda: chain(normed),
}


@ways
@pytest.mark.parametrize("kind", NETS)
@pytest.mark.filterwarnings("ignore:memory_budget")
def test_each_hook_runs_as_often_as_under_standard_autograd(kind, way):
    net, x = NETS[kind](), frames()
    twin = copy.deepcopy(net)
    logs = Log(net, scaled), Log(twin, scaled)
    for _ in range(2):  # a budget plans in the first step
        forward(way, net, squares(x), False).backward()
        forward(way, twin, squares(x), True).backward()
    assert_same(net, twin, [logs])


@ways
def test_hooks_that_come_between_the_passes_and_go_by_themselves(way):
    """Two hooks that do not commute, one that is removed before the backward pass, and one that removes itself."""
    net, x = chain(Body), frames()
    twin = copy.deepcopy(net)
    for model in (net, twin):
        gone = Log(model, lambda g: 7 * g)
        loss = forward(way, model, squares(x), model is twin)
        gone.remove()
        for p in model.parameters():
            p.register_hook(lambda g: g + 1)
            p.register_hook(lambda g: g * g)
            handles = []

            def once(g, handles=handles):
                handles[0].remove()
                return -g

            handles.append(p.register_hook(once))
        loss.backward()
        assert not gone.names
        forward(way, model, squares(x), model is twin).backward()
    assert_same(net, twin)


@ways
def test_hooks_after_the_gradient_is_accumulated_run_once(way):
    net, x, seen = chain(Body), frames(), []
    twin = copy.deepcopy(net)
    for p in net.parameters():
        p.register_hook(scaled)
        p.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    for p in twin.parameters():
        p.register_hook(scaled)
    forward(way, net, squares(x), False).backward()
    forward(way, twin, squares(x), True).backward()
    assert_same(net, twin)
    assert len(seen) == len(list(net.parameters()))


@ways
def test_hooks_on_the_gradients_of_some_parameters(way):
    net, x = affine_two(), frames()
    twin, found = copy.deepcopy(net), []
    for model in (net, twin):
        log = Log(model, scaled)
        loss = forward(way, model, squares(x), model is twin)
        wanted = [p for name, p in model.named_parameters() if "first" in name]
        found.append(torch.autograd.grad(loss, wanted))
        assert len(log.names) == len(wanted)
    for f, e in zip(*found, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-9)


class Weighing(Body):
    def forward(self, x, weight):
        return super().forward(x) * weight


@ways
@pytest.mark.parametrize("own", [True, False])
def test_hooks_on_a_tensor_of_the_context(way, own):
    """A parameter from elsewhere, or one that a conditioner holds too."""
    results, counts = [], []
    for plain in (False, True):
        net, x = chain(Weighing), frames()
        weight = net[1].F.last.bias if own else nn.Parameter(torch.linspace(1, 2, 4, dtype=torch.float64))
        calls = []
        weight.register_hook(lambda g, calls=calls: (calls.append(1), 2 * g)[1])
        forward(way, net, squares(x, weight=weight), plain).backward()
        results.append(weight.grad)
        counts.append(len(calls))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
    assert counts == [1, 1]


@ways
@pytest.mark.parametrize("states", ["kept", 3, "offloaded"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_recurrence_whose_cells_may_share_a_body(way, states, tied):
    torch.manual_seed(1)
    body = Body()
    cells = [Cell(body if tied else Body()) for _ in range(2)]
    net = revflow.ReversibleRecurrence(cells, states=states).double()
    twin = copy.deepcopy(net)
    logs = Log(net, scaled), Log(twin, scaled)
    forward(way, net, through_time(5), False).backward()
    forward(way, twin, through_time(5), True).backward()
    assert_same(net, twin, [logs])
    assert len(logs[0].names) == len(list(net.parameters()))
