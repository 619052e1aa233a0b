"""Contexts that end with the forward pass: other couplings, blocks of one's own, two conditioners, nested checkpoints."""

import enum
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

import revflow
from engine.against_plain import Body, assert_right, chain, frames, recurrence, squared, through_time
from engine.kinds import NETS, nets, two

pytestmark = pytest.mark.filterwarnings("ignore:memory_budget")


class Mode(enum.Enum):
    BASE = 0
    ADAPTED = 1


class LowRank(nn.Module):
    """Wraps a layer, as adapters do. One factor is zero at first: values do not tell whether it is on."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.down, self.up = nn.Linear(layer.in_features, 2), nn.Linear(2, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)
        self.disabled, self.mode, self.active = True, Mode.BASE, None

    def forward(self, x):
        y = self.layer(x)
        return y if self.disabled or self.mode is Mode.BASE or self.active != "default" else y + self.up(self.down(x))


def adapted(outputs=4):
    body = Body(outputs)
    body.first = LowRank(body.first)
    return body


@contextmanager
def adapters(net):
    layers = [m for m in net.modules() if isinstance(m, LowRank)]
    for layer in layers:
        layer.disabled, layer.mode, layer.active = False, Mode.ADAPTED, "default"
    yield
    for layer in layers:
        layer.disabled, layer.mode, layer.active = True, Mode.BASE, None


@nets
@pytest.mark.parametrize("inside", [True, False])
def test_an_adapter_inside_of_a_conditioner_that_is_on_or_off_for_the_forward_pass(kind, inside):
    x, net = frames(), NETS[kind](adapted)

    def on(given):
        with adapters(given):
            return given(x).square().sum()

    def off(given):
        loss = given(x).square().sum()
        adapters(given).__enter__()
        return loss

    assert_right(net, on if inside else off, [x])
    assert all(m.disabled is inside for m in net.modules() if isinstance(m, LowRank))


KINDS = {"orthogonal": orthogonal, "weight_norm": weight_norm, "spectral_norm": spectral_norm}


@nets
@pytest.mark.parametrize("name", KINDS)
def test_cached_parametrizations(kind, name):
    def make(outputs=4):
        body = Body(outputs)
        KINDS[name](body.first)
        return body

    if "chunks" in kind and name == "spectral_norm":
        pytest.skip("its vectors move once per slice")
    x = frames()
    with parametrize.cached():
        assert_right(NETS[kind](make), squared(x), [x])

    def loss_of(given):
        with parametrize.cached():
            return given(x).square().sum()

    assert_right(NETS[kind](make), loss_of, [x], steps=2)


def test_a_parametrized_layer_that_the_network_uses_in_front_too():
    """The user's own cache holds its weight when the conditioners run."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared = orthogonal(nn.Linear(4, 4))
            self.blocks = chain(lambda: nn.Sequential(self.shared, nn.Tanh()))

        def forward(self, x):
            return self.blocks(torch.cat((self.shared(x[..., :4]), x[..., 4:]), -1))

    x, net = frames(), Network().double()

    def loss_of(given):
        with parametrize.cached():
            return given(x).square().sum()

    assert_right(net, loss_of, [x], steps=2)


class Making(Body):
    def forward(self, x):
        return super().forward(x) * torch.tensor(1 / 3).to(x.dtype)  # in the default dtype


@nets
def test_the_default_dtype(kind):
    x = frames()

    def loss_of(given):
        torch.set_default_dtype(torch.bfloat16)
        loss = given(x).square().sum()
        torch.set_default_dtype(torch.float32)
        return loss

    assert_right(NETS[kind](Making), loss_of, [x])
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("states", ["kept", 2])
def test_the_default_dtype_of_a_recurrence(states):
    run = through_time()

    def loss_of(given):
        torch.set_default_dtype(torch.bfloat16)
        loss = run(given)
        torch.set_default_dtype(torch.float32)
        return loss

    assert_right(recurrence(Making, states), loss_of)


@nets
@pytest.mark.parametrize("kernels", [[SDPBackend.MATH], [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]], ids=len)
def test_kernels_of_attention(kind, kernels):
    seen = {False: set(), True: set()}

    class Attending(Body):
        def forward(self, x):
            cuda = torch.backends.cuda
            enabled = cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()
            seen[revflow.is_recomputing()].add(enabled)
            q = self.first(x)[None, None]
            return self.last(torch.tanh(q + nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True))[0, 0])

    x = frames()

    def loss_of(given):
        with sdpa_kernel(kernels):
            return given(x).square().sum()

    net = NETS[kind](Attending) if "chunks" not in kind else two(Attending, guard="raise")
    assert_right(net, loss_of, [x])
    assert seen[True] == seen[False] == {(len(kernels) == 2, False, True)}
    assert torch.backends.cuda.mem_efficient_sdp_enabled()


def nested(net, x):
    return checkpoint(lambda x: checkpoint(net, x, use_reentrant=False), x, use_reentrant=False)


def partly(net, x):
    def both(x):
        with revflow.ordinary_autograd():
            y = net(x)
        return net(y)

    return checkpoint(both, x, use_reentrant=False)


def first_of_two(net, x):
    with revflow.ordinary_autograd():
        y = checkpoint(net, x, use_reentrant=False)
    return checkpoint(net, y, use_reentrant=False)


def around(run):
    def within(net, x):
        with revflow.ordinary_autograd():
            return run(net, x)

    return within


PROGRAMS = {
    "nested": around(nested),
    "reentrant": around(lambda net, x: checkpoint(net, x, use_reentrant=True)),
    "one network, inside and outside": partly,
    "one network in two checkpoints": first_of_two,
    "one network, both inside": around(partly),
    "all of a call": around(lambda net, x: checkpoint(net, x, use_reentrant=False)),
}


@nets
@pytest.mark.parametrize("program", PROGRAMS)
def test_ordinary_autograd_around_checkpoints(kind, program):
    x = frames()
    assert_right(NETS[kind](Body), lambda net: PROGRAMS[program](net, x).square().sum(), [x], steps=2)
