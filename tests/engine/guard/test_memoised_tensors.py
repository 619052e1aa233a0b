"""Tensors that the first evaluation keeps outside of the conditioner's attributes, and that the second one reads."""

import functools
from typing import ClassVar

import pytest
import torch
from torch import nn

import revflow
from engine.against_plain import Body, Halved, assert_right, chain, frames, recurrence, squared, through_time

CACHE: dict[int, torch.Tensor] = {}


class InGlobal(Body):
    """A weight that is scaled once a step; the cache is emptied by whoever trains."""

    def scale(self):
        if id(self) not in CACHE:
            CACHE[id(self)] = torch.tanh(self.first.weight)
        return CACHE[id(self)]

    def forward(self, x):
        return self.last(torch.tanh(nn.functional.linear(x, self.scale())))


class InClass(InGlobal):
    memo: ClassVar[dict[int, torch.Tensor]] = {}

    def scale(self):
        if id(self) not in type(self).memo:
            type(self).memo[id(self)] = torch.tanh(self.first.weight)
        return type(self).memo[id(self)]


class ByFunctools(InGlobal):
    @functools.cache  # noqa: B019
    def scale(self):
        return torch.tanh(self.first.weight)


class InSubmodule(InGlobal):
    """An attribute of a layer of PyTorch's, whose attributes nobody watches."""

    def scale(self):
        if not hasattr(self.first, "memo"):
            self.first.memo = torch.tanh(self.first.weight)
        return self.first.memo


class InListedModule(InGlobal):
    def scale(self):
        if not hasattr(self, "others"):
            self.__dict__["others"] = (nn.Identity(),)
        if not hasattr(self.others[0], "memo"):
            self.others[0].memo = torch.tanh(self.first.weight)
        return self.others[0].memo


KINDS = [InGlobal, InClass, ByFunctools, InSubmodule, InListedModule]
NETS = {
    "additive": lambda make: chain(make),
    "affine": lambda make: chain(lambda: Halved(make(8)), coupling=revflow.AffineCoupling),
    "chunks": lambda make: chain(make, chunks=2),
    "exact": lambda make: chain(make, exact=True),
}
REFUSED = (
    r"(?s){} .*reads a tensor of shape .*\(by tanh\) that a first evaluation computed.*Compute it in each evaluation"
)


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("make", KINDS)
def test_what_is_kept_with_a_graph_under_standard_autograd(kind, make):
    loss = squared(frames())(NETS[kind](make))
    with pytest.raises(RuntimeError, match=REFUSED.format("block 2")):
        loss.backward()


@pytest.mark.parametrize("states", ["kept", 2])
@pytest.mark.parametrize("make", KINDS)
def test_in_a_cell(states, make):
    loss = through_time()(recurrence(make, states))
    with pytest.raises(RuntimeError, match=REFUSED.format("cell 1")):
        loss.backward()


def test_what_one_block_makes_and_another_reads():
    class Writes(Body):
        def forward(self, x):
            CACHE[0] = torch.tanh(self.first(x))
            return self.last(CACHE[0])

    class Reads(Body):
        def forward(self, x):
            return self.last(torch.tanh(self.first(x)) + CACHE[0])

    net = revflow.ReversibleSequence([revflow.AdditiveCoupling(m()) for m in (Writes, Reads)], split_dim=-1).double()
    loss = squared(frames())(net)
    with pytest.raises(RuntimeError, match=REFUSED.format("block 1")):
        loss.backward()


class Free(InGlobal):
    """What needs no gradient may be kept anywhere."""

    def scale(self):
        if id(self) not in CACHE:
            CACHE[id(self)] = self.constant()
        return self.first.weight * CACHE[id(self)]

    def constant(self):
        return torch.linspace(0, 1, 4, dtype=torch.float64).cos()


class Detached(Free):
    def constant(self):
        return torch.tanh(self.first.weight).detach()


class ByData(Free):
    def constant(self):
        return torch.tanh(self.first.weight.data)


class WithoutGrad(Free):
    def constant(self):
        with torch.no_grad():
            return torch.tanh(self.first.weight)


class Decorated(Free):
    @torch.no_grad()
    def constant(self):
        with torch.enable_grad():
            torch.tanh(self.first.weight)
        return torch.tanh(self.first.weight)


class Mask(Free):
    def constant(self):
        return (self.first.weight > 0).double()


@pytest.mark.parametrize("make", [Free, Detached, ByData, WithoutGrad, Decorated, Mask])
def test_what_needs_no_gradient(make):
    x = frames()
    for net, loss in ((chain(make), squared(x)), (recurrence(make), through_time())):
        CACHE.clear()
        assert_right(net, loss, [x], steps=2)


@pytest.fixture(autouse=True)
def empty():
    yield
    CACHE.clear()
    InClass.memo.clear()
