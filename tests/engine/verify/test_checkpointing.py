"""verify's measurement of checkpointing: the same gradients as standard autograd, the bytes of checkpointing by hand, and when
there is no such measurement."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import revflow
from engine import cells
from engine.nets import STACKS, Conditioner, additive, image, network
from revflow._verify.checkpointing import Checkpointing, _groups

checkpoints = pytest.mark.parametrize("forward_passes_before", [0, 1])
"""The first forward pass counts the checkpoints; later ones leave out the last."""


def gradients(net, run, inputs):
    torch.manual_seed(0)
    wanted = [*inputs, *net.parameters()]
    return torch.autograd.grad(run().square().sum(), wanted, allow_unused=True)


def assert_same_as_standard(net, run, inputs, passes_before=0):
    with revflow.ordinary_autograd():
        expected = gradients(net, run, inputs)
    checkpointing = Checkpointing()
    for _ in range(passes_before + 1):
        with checkpointing.of(net):
            found = gradients(net, run, inputs)
    for e, f in zip(expected, found, strict=True):
        assert (e is None) == (f is None)
        assert e is None or torch.equal(e, f)
    return checkpointing


@checkpoints
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("stack", STACKS, ids=lambda s: s.__name__)
def test_gradients_are_those_of_standard_autograd(stack, exact, forward_passes_before):
    net = revflow.ReversibleSequence(list(network(stack, dropout=0.3)), exact=exact)
    x, condition = image().requires_grad_(), torch.full((1, 1, 1, 1), 0.9, dtype=torch.float64, requires_grad=True)
    assert_same_as_standard(net, lambda: net(x, condition=condition), [x, condition], forward_passes_before)
    with torch.no_grad():
        y = net(x, condition=condition)
    y.requires_grad_()
    assert_same_as_standard(net, lambda: net.inverse(y, condition=condition), [y, condition], forward_passes_before)
    assert "_run" not in vars(net)


@checkpoints
def test_log_determinants(forward_passes_before):
    net, x = network(STACKS[2]), image().requires_grad_()
    assert_same_as_standard(net, lambda: net.forward_with_log_det(x)[1], [x], forward_passes_before)


@checkpoints
def test_time_steps_of_a_recurrence(forward_passes_before):
    net, (inputs, state) = cells.recurrence(dropout=0.3), cells.given()
    tensors = [t for streams in inputs for t in streams]
    checkpointing = assert_same_as_standard(
        net, lambda: torch.cat([s for out in net(inputs, state)[0] for s in out]), tensors, forward_passes_before
    )
    assert checkpointing.count == cells.STEPS
    assert "plain_step" not in vars(net)


def test_a_checkpoint_contains_a_coupling_and_the_bijections_before_it():
    torch.manual_seed(0)
    unshuffle = revflow.PixelUnshuffle(2)
    inner = revflow.ReversibleSequence([additive(4), unshuffle])
    net = revflow.ReversibleSequence([unshuffle, additive(4), inner, additive(16), unshuffle]).double()
    assert [len(group) for group in _groups(net)] == [2, 1, 3]
    x = torch.randn(2, 2, 8, 8, dtype=torch.float64).requires_grad_()
    assert assert_same_as_standard(net, lambda: net(x), [x]).count == 3


def test_peaks_are_those_of_checkpointing_by_hand():
    torch.manual_seed(0)
    blocks = [additive(4) for _ in range(8)]
    x = torch.randn(2, 8, 16, 16)
    found = revflow.verify(revflow.ReversibleSequence(blocks), x).checkpoint

    def run(x):
        streams = x.chunk(2, 1)
        for block in blocks[:-1]:
            streams = checkpoint(block, *streams, use_reentrant=False)
        return torch.cat(blocks[-1](*streams), 1)

    def step():
        given = x.clone().requires_grad_()
        y = run(given)
        weights = torch.arange(y.numel()).add(1).double().cos().view(y.shape)
        loss = torch.zeros(()) + (y * weights.to(y.dtype)).sum()
        torch.autograd.grad(loss, [given, *(p for block in blocks for p in block.parameters())])

    assert found.peak == pytest.approx(revflow.measure_memory(step).peak, rel=0.02)
    assert found.time > 0


def test_the_report_compares_with_checkpointing():
    torch.manual_seed(0)
    report = revflow.verify(revflow.ReversibleSequence([additive(4) for _ in range(12)]), torch.randn(2, 8, 16, 16))
    assert report.peak.engine < report.checkpoint.peak < report.peak.plain
    line = next(line for line in str(report).splitlines() if line.startswith("checkpointing"))
    assert f"time {report.checkpoint.time:.2f}× standard autograd" in line and len(line) <= 80
    assert "less memory" not in str(report)


class Stages(nn.Module):
    """Reversible blocks of which each stores its input, so that the engine saves nothing that checkpointing does not."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(revflow.ReversibleSequence([additive(4)]) for _ in range(8))

    def forward(self, x):
        for stage in self.stages:
            x = torch.tanh(stage(x)) * x
        return x


def test_the_report_says_so_if_checkpointing_uses_less_memory():
    torch.manual_seed(0)
    report = revflow.verify(Stages(), torch.randn(2, 8, 16, 16))
    assert ("uses less memory" in str(report)) == (report.checkpoint.peak < report.peak.engine)
    less = revflow.Verification(**{**vars(report), "checkpoint": report.checkpoint._replace(peak=1, time=0.01)})
    assert "note: for this network, checkpointing each block uses less memory and less time" in str(less)
    slow = revflow.Verification(**{**vars(report), "checkpoint": report.checkpoint._replace(peak=1, time=100.0)})
    assert "checkpointing each block uses less memory\n" in str(slow)


def test_a_network_of_one_block_has_no_checkpoint():
    report = revflow.verify(revflow.ReversibleSequence([additive(4)]), torch.randn(2, 8, 4, 4))
    assert report.checkpoint is None and not report.notes and "checkpointing" not in str(report)


def test_calls_that_the_network_checkpoints_itself_are_left_alone():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = network(STACKS[0])

        def forward(self, x):
            return checkpoint(self.body, x, use_reentrant=False)

    net, x = Network(), image().requires_grad_()
    assert assert_same_as_standard(net, lambda: net(x), [x], 1).count == 0
    assert revflow.verify(net, image()).checkpoint is None


class Counting(Conditioner):
    """Saves other values in each evaluation, which no gradient but checkpointing's shows."""

    def forward(self, x):
        return torch.tanh(super().forward(x) * self.calls)


class Shrinking(Conditioner):
    """Saves more tensors in the first evaluation."""

    def forward(self, x):
        out = super().forward(x)
        return torch.tanh(torch.tanh(out)) if self.calls == 1 else out


@pytest.mark.parametrize(
    ("kind", "note"),
    [(Counting, "is not measured, because it changes the gradient of"), (Shrinking, "checkpointing each block fails")],
)
def test_a_network_that_cannot_be_checkpointed_has_a_note(kind, note):
    torch.manual_seed(0)
    net = revflow.ReversibleSequence([revflow.AdditiveCoupling(kind(4)) for _ in range(3)])
    report = revflow.verify(net, torch.randn(2, 8, 4, 4))
    assert report.checkpoint is None and report.peak is not None
    (found,) = [n for n in report.notes if "checkpointing" in n]
    assert note in found and "\n" not in found
