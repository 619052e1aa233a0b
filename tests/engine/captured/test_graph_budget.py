"""Memory budgets inside of compiled graphs: the graph stores the activations that `plan` stores."""

import copy

import pytest
import torch
from torch import nn

import revflow
from engine.captured.graphs import Graphs, gradients
from engine.captured.test_captured import normalized
from engine.nets import STACKS, assert_close, image, network


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()  # otherwise, sizes that differ from those of another test are dynamic
    yield
    torch.compiler.reset()


BUDGETS = ["2KiB", "8KiB", "12KiB", "16KiB", "64KiB"]
DEPTH = 12


def linear(budget):
    torch.manual_seed(0)
    bodies = [nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)) for _ in range(DEPTH)]
    return revflow.ReversibleSequence([revflow.AdditiveCoupling(b) for b in bodies], memory_budget=budget)


def saved(net, x, backend):
    """Bytes between the passes, besides the parameters and the input."""
    y = torch.compile(net, backend=backend, fullgraph=True)(x)
    own = {t.data_ptr() for t in (*net.parameters(), x)}
    return sum({t.data_ptr(): t.nbytes for t in y.grad_fn.saved_tensors if t.data_ptr() not in own}.values())


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_graph_stores_what_the_plan_stores(budget):
    net, x, graphs = linear(budget), torch.randn(8, 32, requires_grad=True), Graphs()
    recomputed = linear(budget).plan(torch.randn(8, 32)).first_kept
    held = saved(net, x, graphs)
    stream, stored = 8 * 16 * 4, DEPTH - recomputed
    # A stored block: its input, the input of GELU, and that function's value. Its other stream is not needed.
    of_recomputed = 0 if not recomputed else stream if stored else 2 * stream
    assert held == stored * 3 * stream + of_recomputed
    assert bool(graphs.regions[0]) == bool(recomputed)
    if stored:
        assert held <= int(budget.removesuffix("KiB")) * 2**10


@pytest.mark.parametrize("share", [0.3, 0.7])
@pytest.mark.parametrize("stack", STACKS, ids=lambda s: s.__name__)
def test_gradients(stack, share):
    blocks = list(network(stack))
    x = image().requires_grad_()
    whole = revflow.ReversibleSequence(blocks, memory_budget=2**40)
    most = whole.plan(x).peak
    net = revflow.ReversibleSequence(blocks, memory_budget=int(share * most))
    twin = copy.deepcopy(net)
    graphs = Graphs()
    found = gradients(torch.compile(net, backend=graphs, fullgraph=True), x, net)
    assert_close(found, gradients(twin.plain, x, twin), 1e-10)
    assert bool(graphs.regions[0]) == (net.plan(x).first_kept > 0)


class ScaleAndShift(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.shift = normalized(), normalized()

    def forward(self, x):
        return torch.tanh(self.scale(x)), self.shift(x)


@pytest.mark.parametrize("stored", [0, 1, 2, 3])
def test_log_determinants_and_statistics_of_stored_blocks(stored, monkeypatch):
    monkeypatch.setattr("revflow._captured.survey.number_recomputed", lambda *_: 3 - stored)
    torch.manual_seed(0)
    blocks = [revflow.AffineCoupling(ScaleAndShift()) for _ in range(3)]
    net = revflow.ReversibleSequence(blocks, memory_budget=2**10).double()
    twin, x = copy.deepcopy(net), image().requires_grad_()
    compiled = torch.compile(lambda x: net.forward_with_log_det(x), backend="aot_eager", fullgraph=True)
    found = gradients(compiled, x, net)
    with revflow.ordinary_autograd():
        assert_close(found, gradients(twin.forward_with_log_det, x, twin), 1e-10)
    assert all(map(torch.allclose, net.buffers(), twin.buffers()))


def test_an_inverse_recomputes_all():
    net, graphs = linear("64KiB"), Graphs()
    y = torch.randn(8, 32, requires_grad=True)
    torch.compile(lambda y: net.inverse(y), backend=graphs, fullgraph=True)(y).sum().backward()
    assert len(graphs.regions[1]) == DEPTH // 3


def test_later_budgets_count():
    net, x = linear("min"), torch.randn(8, 32, requires_grad=True)
    held = []
    for budget in ("2KiB", "64KiB", "min", "max"):
        net.memory_budget = budget
        held.append(saved(net, x, "aot_eager"))
    assert held[0] == held[2] < held[1] == held[3]


def test_batches_of_other_sizes_keep_the_budget():
    """The plan is that of a size. A dynamic size would store as many blocks for a large batch as for the first one."""
    net = linear("12KiB")
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for size in (4, 8, 64, 16):
        x = torch.randn(size, 32, requires_grad=True)
        y = compiled(x)
        own = {t.data_ptr() for t in (*net.parameters(), x)}
        held = sum({t.data_ptr(): t.nbytes for t in y.grad_fn.saved_tensors if t.data_ptr() not in own}.values())
        recomputed = linear("12KiB").plan(torch.randn(size, 32)).first_kept if size < 64 else DEPTH
        assert held <= (12 * 2**10 if recomputed < DEPTH else y.nbytes)
