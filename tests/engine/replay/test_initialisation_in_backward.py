"""Blocks that initialize themselves from data: in an inverse that fails, in an inverse pass, inside of other modules."""

import copy

import pytest
import torch
from torch import nn

import revflow
from engine.against_plain import Body, assert_right, frames, squared


class Norm(revflow.Bijection):
    """Initializes itself in whichever direction is called first; the flag is a buffer, as in a checkpoint."""

    def __init__(self):
        super().__init__()
        self.shift, self.log_scale = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
        self.register_buffer("is_initialized", torch.tensor(0, dtype=torch.uint8))

    def initialize(self, x, factor):
        if not self.is_initialized:
            self.set(factor * x.detach().mean(0), (factor * x.detach()).std(0).log())
            self.is_initialized.fill_(1)

    def set(self, shift, log_scale):
        self.shift.detach().copy_(shift)
        self.log_scale.detach().copy_(log_scale)

    def forward(self, *streams):
        self.initialize(streams[0], 1)
        return tuple((s - self.shift) * (-self.log_scale).exp() for s in streams)

    def inverse(self, *streams):
        self.initialize(streams[0], 3)
        return tuple(s * self.log_scale.exp() + self.shift for s in streams)


class Replacing(Norm):
    def set(self, shift, log_scale):
        self.shift.data, self.log_scale.data = shift, log_scale


class Raising(Norm):
    def inverse(self, *streams):
        super().inverse(*streams)
        raise RuntimeError("cannot be undone")


class OfAnotherShape(Norm):
    def inverse(self, *streams):
        return tuple(s[:1] for s in super().inverse(*streams))


class Holding(revflow.Bijection):
    """Holds the block that initializes itself."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleList([Norm(), Norm()])

    def forward(self, *streams):
        for block in self.inner:
            streams = block(*streams)
        return streams

    def inverse(self, *streams):
        for block in reversed(self.inner):
            streams = block.inverse(*streams)
        return streams


PUT_BACK = (
    r"(inverse|forward) of block \d changed a parameter of shape \(4,\), which is put back.*`with torch\.no_grad\(\):`"
)
MESSAGES = {
    Norm: PUT_BACK,
    Replacing: PUT_BACK,
    Holding: PUT_BACK,
    OfAnotherShape: PUT_BACK,
    Raising: "cannot be undone",
}
KINDS = pytest.mark.parametrize("make", MESSAGES, ids=lambda m: m.__name__)


def network(make, **options):
    torch.manual_seed(1)
    blocks = [make(), revflow.AdditiveCoupling(Body(), Body()), make()]
    return revflow.ReversibleSequence(blocks, split_dim=-1, **options).double()


@KINDS
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"exact": revflow.Grid(30)}, {"guard": "off"}], ids=str)
def test_a_failed_backward_pass_leaves_the_network_as_it_was(make, training, options):
    net = network(make, **options).train(training)
    loss = net(frames()).square().sum()
    before, parameters = copy.deepcopy(net.state_dict()), [*net.parameters()]
    with pytest.raises(RuntimeError, match=MESSAGES[make]):
        loss.backward()
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(m.training is training for m in net.modules())


@pytest.mark.parametrize("make", [Norm, Replacing, Holding])
@pytest.mark.parametrize("inverse", [False, True])
def test_the_remedy_is_right(make, inverse):
    net, x = network(make), frames()
    call = (lambda given: given.inverse(x)) if inverse else (lambda given: given(x))
    with torch.no_grad():
        call(net)
    assert_right(net, lambda given: call(given).square().sum(), [x], steps=3)


def test_an_inverse_pass_that_forward_would_change():
    net = network(Norm)
    loss = net.inverse(frames()).square().sum()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError, match=rf"forward {PUT_BACK[PUT_BACK.index('of') :]}"):
        loss.backward()
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_flag_that_is_an_attribute_needs_no_remedy():
    class Flagged(Norm):
        def __init__(self):
            super().__init__()
            del self.is_initialized
            self.is_initialized = False

        def initialize(self, x, factor):
            if not self.is_initialized:
                self.set(factor * x.detach().mean(0), (factor * x.detach()).std(0).log())
                self.is_initialized = True

    x = frames()
    assert_right(network(Flagged), squared(x), [x], steps=2)
