"""torch.compile around a sequence and inside it, and torch.export."""

import pytest
import torch
from torch import nn

import revflow
from engine.cells import given, loss_of, recurrence
from engine.nets import STACKS, Conditioner, assert_close, assert_same_gradients, image, network

stacks = pytest.mark.parametrize("stack", STACKS, ids=lambda s: s.__name__)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.utils.counters.clear()  # which reset() leaves alone, and other tests add to
    yield
    torch.compiler.reset()


def test_compiled_around_a_chain_that_draws_the_engine_stays_out_of_the_graph():
    net, graphs = network(STACKS[0], dropout=0.5), []

    def backend(module, inputs):
        graphs.append(module)
        return module

    torch.compile(nn.Sequential(net), backend=backend)(image().requires_grad_()).sum().backward()
    assert not any("conv" in str(node.target) for graph in graphs for node in graph.graph.nodes)


def test_compiled_around_a_chain_with_dropout():
    """The engine stays out of the graph: a compiled forward pass would draw another mask than the eager rerun."""
    net, x = network(STACKS[0], dropout=0.5), image().requires_grad_()
    model = torch.compile(nn.Sequential(net), backend="eager")
    assert_same_gradients(net, lambda: model(x), lambda: net.plain(x), [x])


def test_compiled_conditioners_draw_the_same_mask_in_both_runs():
    """By inductor, whose random numbers are not eager's: the plain path runs the same compiled conditioners."""
    torch.manual_seed(0)
    conditioner = lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.SiLU(), nn.Linear(8, 4))  # noqa: E731
    net = revflow.ReversibleSequence([revflow.AdditiveCoupling(conditioner()) for _ in range(3)], guard="raise")
    x = torch.randn(16, 8).requires_grad_()
    torch.manual_seed(7)
    eager = net(x)
    assert net.compile_conditioners() is net
    torch.manual_seed(7)
    assert not torch.allclose(net(x), eager)  # other masks: so it is compiled
    assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [x], tolerance=1e-5)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [x], tolerance=1e-5)


def test_a_sequential_conditioner_is_compiled():
    """nn.Module.compile compiles nothing of it."""
    net, graphs = revflow.ReversibleSequence([revflow.AdditiveCoupling(nn.Sequential(nn.Linear(4, 4), nn.SiLU()))]), []

    def backend(module, inputs):
        graphs.append(module)
        return module

    net.compile_conditioners(backend=backend)(torch.randn(2, 8)).sum().backward()
    assert len(graphs) == 2  # without gradients, and with them


@stacks
def test_compiled_conditioners(stack):
    net, x = network(stack, dropout=0.5), image().requires_grad_()
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module

    net.compile_conditioners(backend=backend)
    assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [x])
    assert graphs
    with torch.compiler.set_stance("fail_on_recompile"):
        net(x).sum().backward()


def test_compiled_conditioners_of_more_shapes_than_dynamo_allows():
    torch.manual_seed(0)
    blocks = []
    for k in range(6):
        blocks += [revflow.AdditiveCoupling(Conditioner(2 * 4**k, dropout=0.5)), revflow.PixelUnshuffle(2)]
    net, x = revflow.ReversibleSequence(blocks[:-1]), image(1, 4, 32, 32, dtype=torch.float32).requires_grad_()
    net.compile_conditioners(backend="eager")
    net(x).sum().backward()
    assert not torch._dynamo.utils.counters["unimplemented"]
    with torch.compiler.set_stance("fail_on_recompile"):
        net(x).sum().backward()


def test_compiled_conditioners_keep_the_keys_of_the_state():
    net = network(STACKS[0])
    keys = list(net.state_dict())
    assert list(net.compile_conditioners(backend="eager").state_dict()) == keys


def test_conditioners_of_a_nested_sequence_are_compiled():
    torch.manual_seed(0)
    inner = revflow.AdditiveCoupling(Conditioner(2, dropout=0.5))
    net = revflow.ReversibleSequence([revflow.AdditiveCoupling(revflow.ReversibleSequence([inner]))]).double()
    net.compile_conditioners(backend="eager")
    assert inner.F._compiled_call_impl is not None and net[0].F._compiled_call_impl is None
    x = image().requires_grad_()
    assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [x])


@stacks
def test_without_gradients_a_sequence_is_one_graph(stack):
    net, x = network(stack), image()
    with torch.no_grad():
        assert torch.allclose(torch.compile(net, backend="eager", fullgraph=True)(x), net(x), rtol=1e-12)


@stacks
@pytest.mark.parametrize("strict", [False, True])
def test_export(stack, strict):
    net, x = network(stack).eval(), image()
    program = torch.export.export(net, (x,), strict=strict)
    assert torch.equal(program.module()(x), net.plain(x))


def test_compiled_cells():
    """As before they were compiled, with dropout too."""
    net, (inputs, state), compiled = recurrence(dropout=0.3), given(steps=2), []

    def backend(graph, example):
        compiled.append(graph.code)
        return graph.forward

    def gradients():
        torch.manual_seed(7)
        return torch.autograd.grad(loss_of(net(inputs, state)), list(net.parameters()))

    expected, keys = gradients(), list(net.state_dict())
    assert net.compile_cells(backend=backend) is net and list(net.state_dict()) == keys
    assert_close(gradients(), expected)
    assert any("conv2d" in code and "tanh" in code for code in compiled)
