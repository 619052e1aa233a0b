"""Buffers whose version counters do not tell: queues, codebooks, observers and shared buffers end as under standard autograd."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.ao.quantization as quantization
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

import revflow
from engine.against_plain import Body, Cell, Halved, assert_right, chain, frames, squared, through_time


class Queue(Body):
    """Writes a feature into a queue by `.data`, at a position that is a buffer of integers and is not persistent."""

    def __init__(self, outputs=4):
        super().__init__(outputs)
        self.register_buffer("queue", torch.ones(3, 4))
        self.register_buffer("position", torch.zeros(1, dtype=torch.long), persistent=False)

    def forward(self, x):
        i = int(self.position)
        self.queue.data[i] = x.detach().mean(0)
        self.position.data.fill_((i + 1) % 3)
        return super().forward(x * self.queue.mean(0))


class Codebook(Body):
    """Moves a codebook towards its input, and quantizes with the codebook of before."""

    def __init__(self, outputs=4):
        super().__init__(outputs)
        self.register_buffer("codes", torch.linspace(-1, 1, 20).view(5, 4))
        self.register_buffer("counts", torch.ones(5))

    def forward(self, x):
        codes = self.codes.clone()
        nearest = torch.cdist(x.detach(), codes).argmin(1)
        self.counts.data = 0.9 * self.counts.data + torch.bincount(nearest, minlength=5)
        self.codes.data.index_add_(0, nearest, 0.1 * (x.detach() - codes[nearest]))
        return super().forward(x + codes[nearest]) / self.counts.sum()


class Flag(Body):
    """Initializes a shift at its first call; a buffer of truth values tells whether that is done."""

    def __init__(self, outputs=4):
        super().__init__(outputs)
        self.register_buffer("done", torch.tensor(False))
        self.register_buffer("shift", torch.zeros(4))

    def forward(self, x):
        if not self.done:
            self.shift.data.copy_(x.detach().mean(0))
            self.done.data.fill_(True)
        else:
            self.shift.data.mul_(0.5)
        return super().forward(x - self.shift.clone())


class Reading(nn.Module):
    def forward(self, x):
        return x / self.read[0].clone()


class TwoNames(Body):
    """One buffer under two names, and of two modules: what is written by one is read by the other."""

    def __init__(self, outputs=4):
        super().__init__(outputs)
        count = torch.ones(2, dtype=torch.float64)
        self.register_buffer("written", count)
        self.reading = Reading()
        self.reading.register_buffer("read", count)

    def forward(self, x):
        self.written.data.add_(1)
        return self.reading(super().forward(x))


class Swapping(Body):
    """Two buffers that change places, one of which moves."""

    def __init__(self, outputs=4):
        super().__init__(outputs)
        self.register_buffer("online", torch.ones(()))
        self.register_buffer("target", torch.full((), 2.0))

    def forward(self, x):
        self.target, self.online = self.online, self.target
        self.online.data.add_(1)
        return super().forward(x) * (self.online / self.target).clone()


class Synchronised(Body):
    """A buffer takes the place of another one."""

    def __init__(self, outputs=4):
        super().__init__(outputs)
        self.register_buffer("online", torch.ones(()))
        self.register_buffer("target", torch.full((), 2.0))

    def forward(self, x):
        before = self.target
        self.online = self.online + 1
        self.target = self.online
        return super().forward(x) * before.clone() / self.online


KINDS = [Queue, Codebook, Flag, TwoNames, Swapping, Synchronised]
kinds = pytest.mark.parametrize("make", KINDS, ids=lambda m: m.__name__)
modes = pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])


def two(make, **options):
    torch.manual_seed(4)
    blocks = [revflow.GatedCoupling(Halved(make(8)), Halved(make(8))) for _ in range(2)]
    return revflow.ReversibleSequence(blocks, split_dim=-1, **options).double()


def tie(net):
    """`double` parts what is shared."""
    for m in net.modules():
        if isinstance(m, TwoNames):
            m.reading.read = m.written
    return net


@kinds
@modes
@pytest.mark.parametrize("options", [{}, {"memory_budget": "3kB"}, {"exact": revflow.Grid(30)}], ids=str)
@pytest.mark.filterwarnings("ignore:memory_budget")
def test_gated_blocks_with_two_conditioners(make, mode, options):
    net, x = tie(two(make, **options)).train(mode), frames()
    assert_right(net, squared(x), [x], steps=4, tolerance=1e-7 if "exact" in options else 1e-9)


@kinds
@pytest.mark.parametrize("way", ["save_on_cpu", "retained"])
def test_while_the_graph_is_packed_or_kept(make, way):
    x = frames()

    def loss_of(net):
        with save_on_cpu() if way == "save_on_cpu" else nullcontext():
            loss = net(x).square().sum()
        if way == "retained":
            loss.backward(retain_graph=True)
            return loss + net(2 * x).sum()
        return loss

    assert_right(tie(chain(make)), loss_of, [x], steps=2)


@pytest.mark.parametrize("make", [Queue, Codebook, TwoNames, Swapping], ids=lambda m: m.__name__)
def test_a_checkpoint_moves_buffers_as_often_as_under_standard_autograd(make):
    net, x = tie(chain(make)), frames()
    twin = copy.deepcopy(net)
    for model in (net, twin):
        with revflow.ordinary_autograd() if model is twin else nullcontext():
            checkpoint(model, x, use_reentrant=False).square().sum().backward()
    for (name, a), b in zip(net.named_buffers(), twin.named_buffers(), strict=True):
        torch.testing.assert_close(a, b[1], msg=lambda m, n=name: f"{n}: {m}")


@kinds
@pytest.mark.parametrize("states", ["kept", 3])
def test_one_module_in_all_cells(make, states):
    torch.manual_seed(1)
    body = make()
    net = tie(revflow.ReversibleRecurrence([Cell(body) for _ in range(2)], states=states).double())
    assert_right(net, through_time(5), steps=3)


@kinds
def test_one_module_in_all_blocks(make):
    body = make()
    net = tie(chain(lambda: body))
    for scale in (1, 2, 0.5):
        x = (scale * frames()).detach().requires_grad_()
        assert_right(net, squared(x), [x])


@pytest.mark.parametrize("make", [TwoNames, Swapping, Synchronised], ids=lambda m: m.__name__)
def test_chunks_move_buffers_once_per_slice(make):
    """The look at mixing samples that is taken in the first step leaves no trace."""
    net, twin, x = tie(chain(make, chunks=2)).eval(), tie(chain(make)).eval(), frames()
    streams = x.detach().chunk(2, -1)
    for _ in range(2):
        net(x).sum().backward()
        now = list(streams)
        for block in twin:
            with torch.no_grad():
                now = [torch.cat(p) for p in zip(*[block(*(s[i] for s in now)) for i in PARTS], strict=True)]
        for (name, a), b in zip(net.named_buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(a, b, msg=lambda m, n=name: f"{n}: {m}")


PARTS = slice(0, 3), slice(3, 6)


class Seeing(Body):
    """Remembers its inputs in a list, and their number in a tuple."""

    def __init__(self):
        super().__init__()
        self.means, self.latest = [], (torch.zeros(()), 0)

    def forward(self, x):
        self.means.append(x.detach().mean())
        self.latest = (self.means[-1], len(self.means))
        return super().forward(x)


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_the_first_step_with_chunks_leaves_no_trace_in_attributes(chunks):
    net, x = chain(Seeing, chunks=chunks), frames()
    for step in range(1, 4):
        net(x).sum().backward()
        expected = x.detach().chunk(2, -1)[1].chunk(chunks)[-1].mean()
        assert [len(b.F.means) for b in net] == [chunks * step] * 3
        torch.testing.assert_close(net[0].F.latest[0], expected)


def observed(outputs=4, shared=None):
    inner = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, outputs))
    inner.qconfig = quantization.get_default_qat_qconfig("x86")
    body = quantization.prepare_qat(inner.train())
    return nn.Sequential(body, shared) if shared is not None else body


def fake_quantizer():
    return quantization.get_default_qat_qconfig("x86").activation()


def quantized(kind):
    torch.manual_seed(0)
    if kind == "two conditioners with one observer":
        shared = fake_quantizer()
        blocks = [revflow.AdditiveCoupling(observed(4, shared), observed(4, shared)) for _ in range(2)]
    elif kind == "gated":
        blocks = [revflow.GatedCoupling(Halved(observed(8)), Halved(observed(8))) for _ in range(2)]
    else:
        blocks = [revflow.AdditiveCoupling(observed()) for _ in range(3)]
    return revflow.ReversibleSequence(blocks, split_dim=-1, **({"memory_budget": "1kB"} if kind == "budget" else {}))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", ["two conditioners with one observer", "gated", "budget"])
def test_fused_fake_quantizers_whose_range_moves_then_stands_still(kind):
    net = quantized(kind)
    for step, scale in enumerate((1, 5, 2, 9)):
        if step == 2:
            net.apply(quantization.disable_observer)
        x = (scale * torch.randn(6, 8, generator=torch.Generator().manual_seed(step))).requires_grad_()
        assert_right(net, squared(x), [x], tolerance=1e-4)


class QuantizedCell(Cell):
    def __init__(self, body):
        super().__init__(body)
        self.quantize = fake_quantizer()

    def update(self, streams, state, memory, context):
        (state,), memory = super().update(streams, state, memory, context)
        return (self.quantize(state),), memory


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("states", ["kept", 2, "offloaded"])
def test_a_fused_fake_quantizer_in_a_cell(states):
    torch.manual_seed(2)
    net = revflow.ReversibleRecurrence([QuantizedCell(Body()) for _ in range(2)], states=states)
    inputs = [(3**t * torch.randn(3, 4, generator=torch.Generator().manual_seed(t)),) for t in range(4)]
    first = revflow.RecurrentState(((torch.zeros(3, 4),),) * 2, ((), ()))
    assert_right(net, lambda given: sum(o[0].square().sum() for o in given(inputs, first)[0]), tolerance=1e-4, steps=2)
