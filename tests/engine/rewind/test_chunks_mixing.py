"""Conditioners in which samples see each other are refused, with chunks; others are not."""

import random

import pytest
import torch
from torch import nn

import revflow
from engine.nets import (
    Conditioner,
    additive,
    assert_close,
    assert_same_gradients,
    of_one,
    relative_error,
)
from engine.slices import batch, gradients_of, in_slices, one_block, per_sample, sliced, snapshot, values


class Mixer(nn.Module):
    """Through `mix`, of the input or of the condition; the last layer begins at zero on demand."""

    def __init__(self, mix, of="input", zero=False, outputs=1):
        super().__init__()
        self.first, self.last = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4 * outputs, 1)
        self.mix, self.of, self.outputs = mix, of, outputs
        if zero:
            nn.init.zeros_(self.last.weight)
            nn.init.zeros_(self.last.bias)

    def forward(self, x, condition=None):
        hidden = self.first(x)
        if self.of == "condition":
            condition = self.mix(condition)
        else:
            hidden = self.mix(hidden)
        if condition is not None:
            hidden = hidden * condition
        out = self.last(hidden.tanh())
        return out if self.outputs == 1 else out.chunk(self.outputs, 1)


def minus_the_mean(h):
    return h - h.mean(0)


def attention(h):
    rows = h.flatten(1)
    return (torch.softmax(rows @ rows.T / rows.shape[1], 1) @ rows).view_as(h)


def dropout(h):
    return nn.functional.dropout(h, 0.5)


MIXING = {"mean": minus_the_mean, "attention": attention, "roll": lambda h: h.roll(1, 0)}
mixing = pytest.mark.parametrize("mix", MIXING.values(), ids=MIXING)
REFUSAL = r"block 0 \(\w+\).*chunks=2: the conditioner Mixer mixes the samples of a batch"


@mixing
@pytest.mark.parametrize("kind", [revflow.AdditiveCoupling, revflow.AffineCoupling, revflow.GatedCoupling])
def test_a_conditioner_that_mixes_is_refused(mix, kind):
    net = one_block(Mixer(mix, outputs=len(kind.coefficients)), kind=kind)
    for _ in range(2):
        for run in (net, net.inverse, net.forward_with_log_det):
            with pytest.raises(ValueError, match=REFUSAL):
                run(batch())
    with torch.no_grad():
        net(batch())
    with revflow.ordinary_autograd():
        net(batch()).sum().backward()


@mixing
@pytest.mark.parametrize("drop", [False, True])
def test_the_second_conditioner_and_dropout_do_not_hide_it(mix, drop):
    torch.manual_seed(0)
    conditioner = Mixer((lambda h: mix(dropout(h))) if drop else mix)
    net = revflow.ReversibleSequence([additive(), revflow.AdditiveCoupling(Conditioner(4), conditioner)], chunks=2)
    with pytest.raises(ValueError, match=r"block 1 .*conditioner Mixer mixes"):
        net.double()(batch())


@pytest.mark.parametrize("mix", [minus_the_mean, lambda c: c - c.mean(0, keepdim=True)])
def test_a_conditioner_that_mixes_its_context_is_refused(mix):
    net = one_block(Mixer(mix, of="condition"))
    with pytest.raises(ValueError, match=REFUSAL):
        net(batch(), condition=per_sample())


def test_a_conditioner_that_reads_one_context_for_all():
    net, c = one_block(Mixer(lambda c: c.mean(0, keepdim=True), of="condition")), per_sample(size=1)
    x = batch()
    assert_same_gradients(net, lambda: net(x, condition=c), lambda: net.plain(x, condition=c), [x, c])


@mixing
def test_a_conditioner_that_begins_at_zero_is_looked_at_again(mix):
    net = one_block(Mixer(mix, zero=True))
    net(batch()).sum().backward()
    nn.init.normal_(net[0].F.last.weight)
    with pytest.raises(ValueError, match=REFUSAL):
        net(batch())


def test_a_conditioner_that_mixes_in_train_mode_alone_is_refused_there():
    class InTraining(Mixer):
        def forward(self, x):
            self.mix = minus_the_mean if self.training else torch.tanh
            return super().forward(x)

    net = one_block(InTraining(None)).eval()
    net(batch()).sum().backward()
    with pytest.raises(ValueError, match=r"the conditioner InTraining mixes"):
        net.train()(batch())


def test_an_error_while_it_is_looked_at_is_not_the_last_word():
    class Failing(Mixer):
        fails = True

        def forward(self, x):
            if self.fails:
                raise RuntimeError("out of order")
            return super().forward(x)

    net = one_block(Failing(minus_the_mean))
    with pytest.raises(RuntimeError, match=r"block 0 .*out of order"):
        net(batch())
    net[0].F.fails = False
    with pytest.raises(ValueError, match="the conditioner Failing mixes"):
        net(batch())


@mixing
def test_it_is_not_looked_for_without_a_guard(mix):
    """guard="off" is at the user's own risk: the function is that of slices."""
    net, x = one_block(Mixer(mix), guard="off"), batch()
    assert_close(*[gradients_of(run(x), [x, *net.parameters()]) for run in (net, in_slices(net).plain)])
    assert relative_error(net(x), net.plain(x)) > 1e-3


class Wandering(nn.Module):
    """Draws, and counts what it has seen in its buffers, which it also uses."""

    def __init__(self):
        super().__init__()
        self.conditioner = Conditioner(4, dropout=0.5)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("latest", torch.zeros(4, 1, 1))

    def forward(self, x):
        self.seen = self.seen + 1
        out = self.conditioner(x) * self.seen + self.latest
        self.latest = self.latest * 0.5 + torch.rand(4, 1, 1, dtype=x.dtype)
        return out + torch.rand(len(x), 1, 1, 1, dtype=x.dtype)


@pytest.mark.parametrize("kind", ["normal", "guard off"])
def test_looking_leaves_everything_as_it_was(kind):
    """Not refused: what differs is drawn, or comes from buffers, not from other samples."""
    torch.manual_seed(0)
    blocks = [revflow.AdditiveCoupling(Wandering(), Wandering()), additive(dropout=0.5)]
    net = revflow.ReversibleSequence(blocks, chunks=2, guard="off" if kind == "guard off" else "warn").double()
    x, start, python = batch(), snapshot(net), random.getstate()
    results = []
    for run in (in_slices(net).plain, net, net):
        net.load_state_dict(start)
        torch.manual_seed(7)
        found = [run(x)]
        state = torch.get_rng_state()
        results.append([*gradients_of(*found, [x, *net.parameters()]), *values(snapshot(net)), state.double()])
    for k in (1, 2):
        assert_close(results[k], results[0])
    assert net[0].F.seen == 2 and random.getstate() == python


@pytest.mark.parametrize("value", [0.0, 0.5, 1e30])
def test_a_batch_of_equal_samples(value):
    """Of which nothing can be told is let through; and nothing is refused without a reason."""
    net = one_block(Conditioner(4, norm=False))
    x = torch.full((4, 8, 6, 4), value, dtype=torch.float64, requires_grad=True)
    assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [x])


def test_the_first_batch_of_one_sample_is_not_the_last_word():
    net = one_block(Mixer(minus_the_mean))
    net(batch(1, 8, 6, 4)).sum().backward()
    with pytest.raises(ValueError, match=REFUSAL):
        net(batch())


@pytest.mark.parametrize("grad", [True, False])
def test_looking_leaves_the_grad_mode_as_it_was(grad):
    net = sliced(of_one(additive))
    with torch.set_grad_enabled(grad):
        net(batch())
        assert torch.is_grad_enabled() == grad and not revflow.is_recomputing()
