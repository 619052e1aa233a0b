"""A backward pass that fails leaves parameters, buffers and attributes as they were."""

import copy
import re

import pytest
import torch
from torch import nn

import revflow
from engine.against_plain import assert_right, frames, squared


class ActNorm(revflow.Bijection):
    """Initializes itself from its first input, whichever way it comes (Glow, Kingma and Dhariwal 2018)."""

    def __init__(self, width=4):
        super().__init__()
        self.shift, self.log_scale = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("ready", torch.tensor(False))

    def initialize(self, x):
        if not self.ready:
            self.write(x.detach())
            self.ready.fill_(True)

    def write(self, x):
        self.shift.data.copy_(x.mean(0))
        self.log_scale.data.copy_(x.std(0).log())

    def forward(self, *streams, **context):
        self.initialize(streams[0])
        return tuple((s - self.shift) * (-self.log_scale).exp() for s in streams)

    def inverse(self, *streams, **context):
        self.initialize(streams[0] * 3 + 1)
        return tuple(s * self.log_scale.exp() + self.shift for s in streams)


class UnderNoGrad(ActNorm):
    def write(self, x):
        with torch.no_grad():
            self.shift.copy_(x.mean(0))
            self.log_scale.copy_(x.std(0).log())


class OfOne(ActNorm):
    def write(self, x):
        self.log_scale.data.fill_(x.std().log())


def chain(make):
    torch.manual_seed(1)
    return revflow.ReversibleSequence([make() for _ in range(2)], split_dim=-1).double()


@pytest.mark.parametrize("make", [ActNorm, UnderNoGrad, OfOne])
def test_a_block_that_initializes_itself_in_its_inverse(make):
    net, x = chain(make), frames()
    loss = net(x).square().sum()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError, match=r"inverse of block 1 changed a parameter .*put back.*torch\.no_grad"):
        loss.backward()
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    fresh = chain(make)
    with torch.no_grad():
        fresh(x)
    assert_right(fresh, squared(x), [x], steps=2)


class Failing(nn.Module):
    """Fails in its second evaluation, when it has changed what it has."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(()))
        self.seen, self.enabled = None, True

    def forward(self, x):
        self.count += 1
        self.seen = x.detach()
        if revflow.is_recomputing():
            raise RuntimeError("out of patience")
        return torch.tanh(self.first(x))


@pytest.mark.parametrize("coupling", [revflow.AdditiveCoupling])
@pytest.mark.parametrize("training", [True, False])
def test_buffers_attributes_modes_and_slots_after_a_failure(coupling, training):
    net, x = revflow.ReversibleSequence([coupling(Failing()) for _ in range(3)], split_dim=-1).double(), frames()
    net.train(training)
    loss = net(x).square().sum()
    net.train(not training)
    held = [(b.F.count, b.F.count.clone(), b.F.seen, b.F.first.weight, b.F.training) for b in net]
    with pytest.raises(RuntimeError, match=re.escape("out of patience")):
        loss.backward()
    for b, (count, value, seen, weight, mode) in zip(net, held, strict=True):
        assert b.F.count is count and torch.equal(count, value) and b.F.seen is seen
        assert b.F.first.weight is weight and b.F.training is mode
    assert torch.is_grad_enabled() and not revflow.is_recomputing()
