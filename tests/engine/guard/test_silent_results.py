"""Losses and features that leave a conditioner by a side door: refused with their place; by a stream of their own: right."""

from collections import deque
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import revflow
from engine.against_plain import Body, Halved, assert_right, chain, frames, recurrence, squared, through_time

REMEDY = r"A loss that is computed from it gives no gradient.*stream of its own.*detach"


class Router(Body):
    """A body whose balance loss `leave` puts somewhere."""

    def __init__(self, leave, outputs=4):
        super().__init__(outputs)
        self.gate, self.leave = nn.Linear(4, 3), leave
        self.kept, self.recent, self.by_name = SimpleNamespace(), deque(maxlen=2), {"losses": []}
        self.register_buffer("balance", torch.zeros(()))

    def forward(self, x):
        shares = self.gate(x).softmax(-1)
        self.leave(self, shares.mean(0).square().sum())
        return super().forward(x) * shares.amax(-1, keepdim=True)


LEAVES = {
    "a namespace": (lambda m, loss: setattr(m.kept, "loss", loss), r"attribute Router\.kept\.loss"),
    "a queue": (lambda m, loss: m.recent.append(loss), r"attribute Router\.recent\[\d\]"),
    "lists by name": (lambda m, loss: m.by_name["losses"].append(loss), r"attribute Router\.by_name\['losses'\]\[\d\]"),
    "a tuple": (lambda m, loss: setattr(m, "results", (loss, 3)), r"attribute Router\.results\[0\]"),
    "a buffer": (lambda m, loss: setattr(m, "balance", loss), r"attribute balance \(a buffer\)"),
    "a submodule": (lambda m, loss: setattr(m.gate, "loss", loss), r"tensor of shape \(.*\).*still held"),
    "the class": (lambda m, loss: setattr(type(m), "latest", loss), r"tensor of shape \(.*\).*still held"),
}
CHAINS = {
    "gated": lambda make: chain(lambda: Halved(make(8)), coupling=revflow.GatedCoupling),
    "exact": lambda make: chain(make, exact=revflow.Grid(30)),
    "chunks": lambda make: chain(make, chunks=3),
    "two conditioners": lambda make: revflow.ReversibleSequence(
        [revflow.AdditiveCoupling(Body(), make()) for _ in range(3)], split_dim=-1
    ).double(),
}


@pytest.mark.parametrize("kind", CHAINS)
@pytest.mark.parametrize("where", LEAVES)
def test_a_loss_is_refused_with_its_place(where, kind):
    leave, place = LEAVES[where]
    loss = CHAINS[kind](lambda outputs=4: Router(leave, outputs))(frames()).sum()
    with pytest.raises(RuntimeError, match=rf"block \d .*{place}.*{REMEDY}"):
        loss.backward()


@pytest.mark.parametrize("where", LEAVES)
def test_the_same_without_a_graph_is_right(where):
    leave, _ = LEAVES[where]
    x = frames()
    assert_right(chain(lambda: Router(lambda m, loss: leave(m, loss.detach()))), squared(x), [x], steps=3)


@pytest.mark.parametrize("where", LEAVES)
def test_standard_autograd_trains_with_the_loss(where):
    """The remedy for who cannot change the conditioner."""
    leave, _ = LEAVES[where]
    kept = []
    net = chain(lambda: Router(lambda m, loss: kept.append(loss) or leave(m, loss)))
    with revflow.ordinary_autograd():
        y = net(frames())
    (y.sum() * 0 + sum(kept)).backward()
    assert all(b.F.gate.weight.grad.abs().sum() > 0 for b in net)


@pytest.mark.parametrize("states", ["kept", 3])
@pytest.mark.parametrize("where", ["a queue", "a tuple", "a buffer"])
def test_a_loss_of_a_recurrence_is_refused(where, states):
    leave, place = LEAVES[where]
    loss = through_time()(recurrence(lambda: Router(leave), states))
    with pytest.raises(RuntimeError, match=rf"cell \d .*{place}.*{REMEDY}"):
        loss.backward()


class Shear(revflow.Bijection):
    """A block of one's own, which keeps the penalty of its shear."""

    def __init__(self):
        super().__init__()
        self.inner, self.found = Body(), []

    def forward(self, x1, x2):
        shear = self.inner(x1)
        self.found.append(shear.square().sum())
        return x1, x2 + shear

    def inverse(self, y1, y2):
        return y1, y2 - self.inner(y1)


def test_a_loss_of_a_block_of_ones_own_is_refused():
    net = revflow.ReversibleSequence([Shear(), Shear()], split_dim=-1).double()
    loss = net(frames()).sum()
    with pytest.raises(RuntimeError, match=rf"block 1 .*attribute Shear\.found\[\d\].*{REMEDY}"):
        loss.backward()


FEATURES = []


def keep(module, inputs, output):
    FEATURES.append(output)


def keep_input(module, inputs):
    FEATURES.append(inputs[0])


@pytest.fixture(autouse=True)
def no_features():
    FEATURES.clear()
    yield
    FEATURES.clear()


HOOKS = {
    "of a layer": lambda f: f.last.register_forward_hook(keep),
    "before a layer": lambda f: f.last.register_forward_pre_hook(keep_input),
    "of the conditioner": lambda f: f.register_forward_hook(keep),
    "in a list of pairs": lambda f: f.first.register_forward_hook(
        lambda m, i, o: FEATURES.append((m, {"out": o.tanh()}))
    ),
}


@pytest.mark.parametrize("steps", [0, 4])
@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("options", [{}, {"exact": revflow.Grid(30)}, {"memory_budget": "1kB"}], ids=str)
@pytest.mark.filterwarnings("ignore:memory_budget")
def test_features_by_a_forward_hook_are_refused_also_if_it_comes_later(options, kind, steps):
    net, x = chain(Body, **options), frames()
    for _ in range(steps):
        net(x).sum().backward()
    for block in net:
        HOOKS[kind](block.F)
    loss = net(x).sum()
    with pytest.raises(RuntimeError, match=rf"block 2 .*still held.*{REMEDY}"):
        loss.backward()


def test_features_of_a_recurrence_by_a_hook_that_comes_later():
    net, loss_of = recurrence(Body), through_time()
    for _ in range(3):
        loss_of(net).backward()
    net[1].body.first.register_forward_hook(keep)
    with pytest.raises(RuntimeError, match=rf"cell 1 .*tensor of shape \(3, 6\).*still held.*{REMEDY}"):
        loss_of(net).backward()


def test_a_layer_of_pytorchs_own_with_a_hook():
    net = chain(lambda: nn.Linear(4, 4))
    net[1].F.register_forward_hook(keep)
    with pytest.raises(RuntimeError, match=rf"block 1 .*tensor of shape \(6, 4\) \(by linear\).*{REMEDY}"):
        net(frames()).sum().backward()


# The supported way: three streams, of which the last one collects.


class OfOne(nn.Module):
    """A conditioner of one of the other streams."""

    def __init__(self, which, body):
        super().__init__()
        self.which, self.body = which, body

    def forward(self, *streams):
        return self.body(streams[self.which])


class Layer(nn.Module):
    """A gated mixture, and per sample its loss."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(4, 3), nn.Linear(4, 12)

    def shares(self, x):
        return self.gate(x).softmax(-1)

    def forward(self, x):
        return (self.experts(x).view(-1, 3, 4) * self.shares(x).unsqueeze(-1)).sum(1)


class Into(revflow.Bijection):
    """Adds to one of three streams what a module makes of another one."""

    def __init__(self, module, source, target):
        super().__init__()
        self.module, self.source, self.target = module, source, target

    def changed(self, streams, sign):
        out = list(streams)
        out[self.target] = streams[self.target] + sign * self.module(streams[self.source])
        return tuple(out)

    def forward(self, *streams):
        return self.changed(streams, 1)

    def inverse(self, *streams):
        return self.changed(streams, -1)


class Penalty(nn.Module):
    """What the loss of a layer needs, from the stream that the layer sees."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer.shares(x).square().sum(-1, keepdim=True)


def mixtures(**options):
    torch.manual_seed(5)
    blocks = []
    for k in range(4):
        layer = Layer()
        blocks += [Into(Penalty(layer), k % 2, 2), Into(layer, k % 2, 1 - k % 2)]
    return revflow.ReversibleSequence(blocks, **options).double()


@pytest.mark.parametrize("options", [{}, {"memory_budget": "3kB"}, {"guard": "raise"}], ids=str)
@pytest.mark.filterwarnings("ignore:memory_budget")
def test_a_third_stream_collects_losses_by_blocks_of_ones_own(options):
    x = frames()

    def loss_of(net):
        y1, y2, losses = net((*x.chunk(2, -1), x.new_zeros(6, 1)))
        return (y1 * y2).sum() + 0.01 * losses.mean()

    assert_right(mixtures(**options), loss_of, [x], steps=2)


def test_the_third_stream_holds_the_sum_of_all_losses():
    net, x, expected = mixtures(), frames(), []
    *_, losses = net((*x.chunk(2, -1), x.new_zeros(6, 1)))
    for block in net:
        if isinstance(block.module, Layer):
            hook = lambda m, i: expected.append(m.shares(i[0]).square().sum(-1, keepdim=True))  # noqa: E731
            block.module.register_forward_pre_hook(hook)
    with revflow.ordinary_autograd():
        net((*x.chunk(2, -1), x.new_zeros(6, 1)))
    torch.testing.assert_close(losses, sum(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"chunks": 2}, {"exact": revflow.Grid(30)}], ids=str)
def test_a_third_stream_carries_features_out(options):
    """Features of each layer, in columns of their own, that a second head reads."""

    class Column(nn.Module):
        def __init__(self, body, k):
            super().__init__()
            self.body, self.k = body, k

        def forward(self, first, other):
            return nn.functional.pad(self.body.first(first).tanh(), (6 * self.k, 12 - 6 * self.k))

    torch.manual_seed(5)
    bodies, blocks = [Body() for _ in range(3)], []
    for k, body in enumerate(bodies):  # the streams rotate: a, b, features
        blocks += [revflow.AdditiveCoupling(OfOne(0, body)), revflow.AdditiveCoupling(OfOne(1, Body()))]
        blocks += [revflow.AdditiveCoupling(Column(body, k))]
    net, x = revflow.ReversibleSequence(blocks, **options).double(), frames()

    def loss_of(given):
        a, b, features = given((*x.chunk(2, -1), x.new_zeros(6, 18)))
        return (a * b).sum() + features.view(6, 3, 6).prod(1).sum()

    assert_right(net, loss_of, [x])
