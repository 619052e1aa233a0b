"""Contexts that end with the forward pass: the second evaluation sees the same, or both do without."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, weight_norm
from torch.utils.checkpoint import checkpoint

import revflow
from engine.against_plain import Body, Halved, assert_right, chain, frames, recurrence, squared, through_time


class Adapted(Body):
    """A low-rank adapter that a switch turns on; as in LoRA one factor is zero at first, so that values do not tell."""

    def __init__(self, outputs=4):
        super().__init__(outputs)
        self.a, self.b = nn.Linear(4, 2, bias=False), nn.Linear(2, outputs, bias=False)
        nn.init.zeros_(self.b.weight)
        self.enabled, self.name = False, None

    def forward(self, x):
        out = super().forward(x)
        return out + self.b(self.a(x)) if self.enabled and self.name == "task" else out


@contextmanager
def adapters(net, name="task"):
    adapted = [m for m in net.modules() if isinstance(m, Adapted)]
    for m in adapted:
        m.enabled, m.name = True, name
    try:
        yield
    finally:
        for m in adapted:
            m.enabled, m.name = False, None


NETS = {
    "additive": lambda make: chain(make),
    "gated": lambda make: chain(lambda: Halved(make(8)), coupling=revflow.GatedCoupling),
    "exact": lambda make: chain(make, exact=revflow.Grid(30)),
    "budget": lambda make: chain(make, memory_budget="1kB"),
    "chunks": lambda make: chain(make, chunks=2),
}
nets = pytest.mark.parametrize("kind", NETS)
pytestmark = pytest.mark.filterwarnings("ignore:memory_budget")


@nets
def test_adapters_that_are_switched_on_around_the_forward_pass(kind):
    x, net = frames(), NETS[kind](Adapted)

    def loss_of(given):
        with adapters(given):
            return given(x).square().sum()

    assert_right(net, loss_of, [x], steps=2)
    assert net[0].F is not None and not any(m.enabled for m in net.modules() if isinstance(m, Adapted))


@pytest.mark.parametrize("states", ["kept", 2])
def test_adapters_of_a_recurrence(states):
    run = through_time()

    def loss_of(net):
        with adapters(net):
            return run(net)

    assert_right(recurrence(Adapted, states), loss_of)


class Symmetric(nn.Module):
    def forward(self, w):
        return w.triu() + w.triu(1).T


def parametrized(kind):
    def make():
        layer = nn.Linear(4, 4)
        if kind == "own":
            parametrize.register_parametrization(layer, "weight", Symmetric())
        return nn.Sequential(
            {"own": lambda m: m, "orthogonal": orthogonal, "weight_norm": weight_norm}[kind](layer), nn.Tanh()
        )

    return make


@pytest.mark.parametrize("kind", ["own", "orthogonal", "weight_norm"])
@pytest.mark.parametrize("around", ["step", "forward"])
def test_cached_parametrizations(kind, around):
    x, net = frames(), chain(parametrized(kind))
    if around == "step":
        with parametrize.cached():
            assert_right(net, squared(x), [x])
        return

    def loss_of(given):
        with parametrize.cached():
            return given(x).square().sum()

    assert_right(net, loss_of, [x])


def test_cached_parametrizations_of_a_recurrence_and_the_users_own_cache():
    with parametrize.cached():
        assert_right(recurrence(parametrized("own")), through_time())
        layer = parametrized("own")()[0]
        assert layer.weight is layer.weight  # the user's own cache is at work again


def test_the_default_dtype():
    class Making(Body):
        def forward(self, x):
            return super().forward(x) * torch.full((4,), 1 / 3).to(x.dtype)  # in the default dtype: other digits

    x = frames()

    def loss_of(given):
        torch.set_default_dtype(torch.float16)
        try:
            return given(x).square().sum()
        finally:
            torch.set_default_dtype(torch.float32)

    assert_right(chain(Making), loss_of, [x])
    assert torch.get_default_dtype() == torch.float32


def test_kernels_of_attention():
    seen = []

    class Attending(Body):
        def forward(self, x):
            seen.append((torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()))
            q = self.first(x)[None, None]
            return self.last(nn.functional.scaled_dot_product_attention(q, q, q)[0, 0])

    x = frames()

    def loss_of(given):
        with sdpa_kernel(SDPBackend.MATH):
            return given(x).square().sum()

    assert_right(chain(Attending), loss_of, [x])
    assert set(seen) == {(True, False)} and torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize("kind", ["additive", "gated", "chunks"])
def test_ordinary_autograd_around_a_checkpoint(kind):
    """The checkpoint recomputes outside of the context."""
    x, net = frames(), NETS[kind](lambda *outputs: Body(*outputs))
    net.plain(x).square().sum().backward()
    expected = [p.grad for p in net.parameters()]
    net.zero_grad()
    with revflow.ordinary_autograd():
        y = checkpoint(net, x, use_reentrant=False)
    y.square().sum().backward()
    for e, p in zip(expected, net.parameters(), strict=True):
        torch.testing.assert_close(p.grad, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("outside", [False, True])
def test_of_two_sequences_in_a_checkpoint_one_within_ordinary_autograd(outside):
    x, first, second = frames(), chain(Body), chain(Body)

    def both(x):
        y = first(x)
        with revflow.ordinary_autograd():
            return second(y)

    second.plain(first.plain(x)).square().sum().backward()
    expected = [p.grad for net in (first, second) for p in net.parameters()]
    first.zero_grad(), second.zero_grad()
    with revflow.ordinary_autograd() if outside else nullcontext():
        y = checkpoint(both, x, use_reentrant=False)
    y.square().sum().backward()
    for e, p in zip(expected, (*first.parameters(), *second.parameters()), strict=True):
        torch.testing.assert_close(p.grad, e, rtol=1e-9, atol=1e-9)


def test_a_recurrence_within_ordinary_autograd_and_a_checkpoint():
    net, loss_of = recurrence(Body), through_time()
    with revflow.ordinary_autograd():
        loss = checkpoint(loss_of, net, use_reentrant=False)
    loss.backward()
    found = [p.grad for p in net.parameters()]
    net.zero_grad()
    with revflow.ordinary_autograd():
        loss_of(net).backward()
    for f, p in zip(found, net.parameters(), strict=True):
        torch.testing.assert_close(f, p.grad, rtol=1e-12, atol=1e-12)


class Listed(Adapted):
    """Its adapters are chosen by a list of names, as peft's."""

    def __init__(self, outputs=4):
        super().__init__(outputs)
        self.active, self.options = [], {"on": False}

    def forward(self, x):
        out = Body.forward(self, x)
        return out + self.b(self.a(x)) if "task" in self.active and self.options["on"] else out


@pytest.mark.parametrize("how", ["another list", "in place"])
@nets
def test_adapters_that_a_list_switches_on_around_the_forward_pass(kind, how):
    x, net = frames(), NETS[kind](Listed)

    def switch(given, active, on):
        for m in given.modules():
            if isinstance(m, Listed):
                if how == "in place":
                    m.active[:] = active
                    m.options.update(on=on)
                else:
                    m.active, m.options = active, {"on": on}

    def loss_of(given):
        switch(given, ["task"], True)
        loss = given(x).square().sum()
        switch(given, [], False)
        return loss

    assert_right(net, loss_of, [x], steps=2)
    assert all(m.active == [] and m.options == {"on": False} for m in net.modules() if isinstance(m, Listed))
