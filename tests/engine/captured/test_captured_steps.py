"""Time steps of a recurrence that torch.compile captures in training."""

import pytest
import torch
from torch import nn

import revflow
from engine.captured.graphs import Graphs
from engine.nets import assert_close


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()  # otherwise, sizes that differ from those of another test are dynamic
    yield
    torch.compiler.reset()


class Cell(revflow.RecurrentCell):
    def __init__(self, drop=0.0):
        super().__init__()
        self.new, self.left, self.scale = nn.Linear(8, 4), nn.Linear(8, 4), 1.0
        self.drop = nn.Dropout(drop)

    def update(self, streams, state, memory, context):
        h = torch.tanh(self.drop(self.new(torch.cat((streams[0], state[0]), -1))) + memory[0]) * context.get("by", 1)
        return (h, state[1] / 2 + h), (torch.tanh(self.left(torch.cat((memory[0], h), -1))) * self.scale,)

    def mix(self, streams, state, context):
        gate = torch.sigmoid(state[0])
        return streams[1] * (1 - gate) + gate * state[0], streams[0]


class Lean(Cell):
    """Without a memory."""

    def update(self, streams, state, memory, context):
        return (torch.tanh(self.new(torch.cat((streams[0], state[0]), -1))),), ()


STEPS = 3


def recurrence(*cells, **options):
    torch.manual_seed(0)
    cells = cells or [Cell() for _ in range(3)]
    return revflow.ReversibleRecurrence(cells, **options).double()


def trained(net, step, streams=None, **context):
    """Outputs and gradients of some time steps, which begin with states that share one tensor."""
    torch.manual_seed(1)
    inputs = [[torch.randn(2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)] for _ in range(STEPS)]
    zeros = torch.zeros(2, 4, dtype=torch.float64)
    lean = isinstance(net[0], Lean)
    state = revflow.RecurrentState(
        cells=((zeros,) if lean else (zeros, zeros),) * len(net), memories=(() if lean else (zeros,),) * len(net)
    )
    values = []
    for t in range(STEPS):
        outputs, state = step(tuple(inputs[t]), state, **context)
        values += [outputs[0].square().sum(), outputs[1].sin().sum()]
    values += [new[-1].sum() for new in state.cells]
    leaves = [*[x for pair in inputs for x in pair], *[v for v in context.values() if torch.is_tensor(v)]]
    leaves += [p for p in net.parameters() if p.requires_grad]
    return [*values, *torch.autograd.grad(sum(values), leaves, allow_unused=True, materialize_grads=True)]


@pytest.mark.parametrize("kind", [Cell, Lean])
@pytest.mark.parametrize("depth", [1, 3])
def test_gradients(kind, depth):
    net, graphs = recurrence(*[kind() for _ in range(depth)]), Graphs()
    found = trained(net, torch.compile(net.step, backend=graphs, fullgraph=True))
    assert_close(found, trained(net, net.plain_step), 1e-10)
    forward, backward = graphs.regions
    assert len(forward) == depth * len(graphs.forward)
    assert len(backward) == (2 * depth - 1) * len(
        graphs.backward
    )  # a mix of every cell but the last, and its gradients


def test_equal_cells_are_compiled_once():
    net, graphs = recurrence(*[Cell() for _ in range(6)]), Graphs()
    trained(net, torch.compile(net.step, backend=graphs, fullgraph=True))
    for graph, functions in (*[(g, 1) for g in graphs.forward], *[(g, 2) for g in graphs.backward]):
        calls = [n.args[1] for n in graph.graph.nodes if "invoke_subgraph" in str(n.target)]
        # The first cell of the first step gets states that are one tensor: that is another function.
        assert functions <= len({*calls}) <= 2 * functions


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_backends(backend):
    net = recurrence()
    assert_close(trained(net, torch.compile(net.step, backend=backend, fullgraph=True)), trained(net, net.plain_step))


def test_keyword_arguments_and_frozen_parameters():
    net = recurrence()
    net[1].new.weight.requires_grad_(False)
    by = torch.rand(2, 1, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(net.step, backend="aot_eager", fullgraph=True)
    for value in by, 0.5:
        assert_close(trained(net, compiled, by=value), trained(net, net.plain_step, by=value))


def test_cells_that_share_parameters():
    cell = Cell()
    net = recurrence(cell, Cell(), cell)
    compiled = torch.compile(net.step, backend="aot_eager", fullgraph=True)
    assert_close(trained(net, compiled), trained(net, net.plain_step))


def test_a_later_change_of_one_cell_counts():
    net = recurrence()
    compiled = torch.compile(net.step, backend="aot_eager", fullgraph=True)
    trained(net, compiled)
    net[1].scale = 2.0
    assert_close(trained(net, compiled), trained(net, net.plain_step))


def test_a_step_stores_its_arguments_and_results():
    net = recurrence(*[Cell() for _ in range(4)])
    x = [torch.randn(2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    states = [tuple(torch.zeros(2, 4, dtype=torch.float64) for _ in range(2)) for _ in net]
    memory = torch.zeros(2, 4, dtype=torch.float64)
    before = revflow.RecurrentState(tuple(states), ((memory,),) * len(net))
    outputs, after = torch.compile(net.step, backend="aot_eager", fullgraph=True)(tuple(x), before)
    known = [*x, *outputs, *net.parameters(), memory]
    known += [t for state in (before, after) for tensors in (*state.cells, *state.memories) for t in tensors]
    saved = {t.data_ptr() for t in outputs[0].grad_fn.saved_tensors}
    assert saved <= {t.data_ptr() for t in known}


OBJECTIONS = {
    "dropout": (lambda: recurrence(Cell(), Cell(drop=0.5)), r"cell 1 \(Cell\): a Cell draws random numbers"),
    "states": (lambda: recurrence(states="bfloat16"), r"states='bfloat16'"),
    "a budget": (lambda: recurrence(memory_budget="1MiB"), "memory budget"),
}


@pytest.mark.parametrize("kind", OBJECTIONS)
def test_what_cannot_be_captured_is_named_and_runs_in_the_engine(kind):
    make, reason = OBJECTIONS[kind]
    net = make()
    with pytest.raises(Exception, match=rf"(?s)time step.*outside of this compiled graph: .*{reason}"):
        trained(net, torch.compile(net.step, backend="aot_eager", fullgraph=True))
    torch.compiler.reset()
    graphs = Graphs()
    with pytest.warns(UserWarning, match=f"outside of this compiled graph: .*{reason}"):
        trained(net, torch.compile(net.step, backend=graphs))
    assert graphs.regions == [[], []]
