"""Buffers that move without raising their version counter, and in eval mode: both evaluations see the same."""

import pytest
import torch
import torch.ao.quantization as quantization
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

import revflow
from engine.against_plain import Body, Halved, assert_right, chain, frames, recurrence, squared, through_time


class Counting(Body):
    """Divides by the number of its calls."""

    def __init__(self, outputs=4):
        super().__init__(outputs)
        self.register_buffer("count", torch.ones(()))

    def move(self):
        self.count.add_(1)

    def forward(self, x):
        self.move()
        return super().forward(x) / self.count.clone()  # plain saves it, and a later step moves it


class ByData(Counting):
    def move(self):
        self.count.data += 1


class Replaced(Counting):
    def move(self):
        self.count = self.count + 1


class Streaming(Counting):
    """A streaming mean, by a kernel that does not raise the version counter."""

    def move(self):
        torch.frombuffer(self.count.numpy(), dtype=self.count.dtype).add_(1)


KINDS = [Counting, ByData, Replaced, Streaming]
kinds = pytest.mark.parametrize("make", KINDS, ids=lambda m: m.__name__)
modes = pytest.mark.parametrize("mode", ["train", "eval"])


@kinds
@modes
@pytest.mark.parametrize("options", [{}, {"exact": revflow.Grid(30)}, {"memory_budget": "1kB"}], ids=str)
@pytest.mark.filterwarnings("ignore:memory_budget")
def test_gradients_and_buffers_are_those_of_plain(make, mode, options):
    x = frames()
    assert_right(chain(make, **options).train(mode == "train"), squared(x), [x], steps=3)


@kinds
@modes
def test_in_a_gated_block_and_a_block_of_ones_own(make, mode):
    class Own(revflow.Bijection):
        def __init__(self):
            super().__init__()
            self.inner = make()

        def forward(self, x1, x2):
            return x1 + self.inner(x2), x2

        def inverse(self, y1, y2):
            return y1 - self.inner(y2), y2

    x = frames()
    gated = chain(lambda: Halved(make(8)), coupling=revflow.GatedCoupling)
    own = revflow.ReversibleSequence([Own() for _ in range(3)], split_dim=-1).double()
    for net in (gated, own):
        assert_right(net.train(mode == "train"), squared(x), [x], steps=2)


@kinds
@modes
@pytest.mark.parametrize("states", ["kept", 2, "offloaded"])
def test_in_a_recurrence(make, mode, states):
    assert_right(recurrence(make, states).train(mode == "train"), through_time(), steps=2)


def quantized(outputs=4):
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, outputs))
    net.qconfig = quantization.get_default_qat_qconfig("x86")
    return quantization.prepare_qat(net.train())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("coupling", [revflow.AdditiveCoupling, revflow.AffineCoupling])
def test_fused_observers_of_quantization_aware_training(coupling):
    make = quantized if coupling is revflow.AdditiveCoupling else lambda: Halved(quantized(8))
    torch.manual_seed(0)
    net = revflow.ReversibleSequence([coupling(make()) for _ in range(3)], split_dim=-1)
    inputs = [torch.randn(6, 8) * scale for scale in (1, 4, 2)]
    for x in inputs:
        x.requires_grad_()
        assert_right(net, squared(x), [x], tolerance=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_spectral_norm_within_a_checkpoint(seed):
    """The buffers of the run whose output is recomputed count, not those of the first run."""
    torch.manual_seed(seed)
    body = lambda: nn.Sequential(spectral_norm(nn.Linear(4, 4)), nn.Tanh())  # noqa: E731
    x, net = frames(), chain(body)
    assert_right(net, lambda given: checkpoint(given, x, use_reentrant=False).square().sum(), [x])


def test_spectral_norm_of_a_recurrence_within_a_checkpoint():
    net = recurrence(lambda: nn.Sequential(spectral_norm(nn.Linear(4, 4)), nn.Tanh()))
    loss_of = through_time()
    assert_right(net, lambda given: checkpoint(loss_of, given, use_reentrant=False))
