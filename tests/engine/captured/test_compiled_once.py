"""Equal groups of blocks are compiled once. Blocks that differ, or that change later, are not taken for equal ones."""

import copy

import pytest
import torch
from torch import nn

import revflow
from engine.captured.graphs import Graphs, gradients
from engine.nets import assert_close
from revflow._captured.structure import length_of_groups, structure_of


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()  # otherwise, sizes that differ from those of another test are dynamic
    yield
    torch.compiler.reset()


class Scaled(nn.Module):
    """A layer with an attribute of each kind."""

    def __init__(self, scale=1.0, function=torch.tanh):
        super().__init__()
        self.layer, self.scale, self.function = nn.Linear(4, 4), scale, function
        self.offset = torch.linspace(0, 1, 4, dtype=torch.float64)

    def forward(self, x):
        return self.function(self.layer(x)) * self.scale * torch.tensor(0.5) + self.offset


def of(*conditioners):
    return revflow.ReversibleSequence([revflow.AdditiveCoupling(c) for c in conditioners]).double()


def trained(net, compiled, x=None):
    """Whether a compiled step agrees with standard autograd."""
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True) if x is None else x
    twin = copy.deepcopy(net)
    assert_close(gradients(compiled, x, net), gradients(twin.plain, x, twin))


@pytest.mark.parametrize(("depth", "calls"), [(3, 1), (12, 4), (16, 4), (32, 8)])
def test_equal_blocks_are_one_function_per_pass(depth, calls):
    net, graphs = of(*[Scaled() for _ in range(depth)]), Graphs()
    trained(net, torch.compile(net, backend=graphs, fullgraph=True))
    for names in graphs.regions:
        assert len(names) == calls
        assert len({*names}) == 1


def test_blocks_of_alternating_kinds_are_one_function_per_pass():
    net, graphs = of(*[kind for _ in range(8) for kind in (Scaled(), nn.Linear(4, 4))]), Graphs()
    trained(net, torch.compile(net, backend=graphs, fullgraph=True))
    assert [len({*names}) for names in graphs.regions] == [1, 1]


def test_two_calls_of_equal_sequences_share_functions():
    net, graphs = nn.Sequential(*[of(*[Scaled() for _ in range(3)]) for _ in range(2)]), Graphs()
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    found = gradients(torch.compile(net, backend=graphs, fullgraph=True), x, net)
    with revflow.ordinary_autograd():
        assert_close(found, gradients(net, x, net))
    assert [(len(names), len({*names})) for names in graphs.regions] == [(2, 1), (2, 1)]


@pytest.mark.parametrize("other", [Scaled(2.0), Scaled(function=torch.sin), nn.Linear(4, 4)], ids=["1", "2", "3"])
def test_blocks_that_differ_are_not_taken_for_equal(other):
    net, graphs = of(*[Scaled() for _ in range(4)], other, *[Scaled() for _ in range(3)]), Graphs()
    trained(net, torch.compile(net, backend=graphs, fullgraph=True))
    assert all(len({*names}) > 1 for names in graphs.regions)


def replaced(module, name, value):
    setattr(module, name, value)


CHANGES = {
    "a number": lambda f: replaced(f, "scale", 3.0),
    "a function": lambda f: replaced(f, "function", torch.sin),
    "an attribute": lambda f: replaced(f, "offset", torch.ones(4, dtype=torch.float64)),
    "values": lambda f: f.offset.mul_(2),
    "a parameter": lambda f: replaced(f.layer, "bias", nn.Parameter(torch.randn(4, dtype=torch.float64))),
    "a layer": lambda f: replaced(f, "layer", nn.Linear(4, 4, bias=False).double()),
    "data": lambda f: replaced(f.layer.weight, "data", torch.randn(4, 4, dtype=torch.float64)),
    "a frozen parameter": lambda f: f.layer.weight.requires_grad_(False),
}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_later_change_of_one_block_counts(backend):
    """Also of a block whose code was not traced, since it is equal to another one."""
    net = of(*[Scaled() for _ in range(8)])
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    trained(net, compiled)
    for change in CHANGES.values():
        change(net[5].F)
        trained(net, compiled)


@pytest.mark.parametrize("depth", [8, 24, 48])
def test_the_output_is_all_that_is_stored(depth):
    """Between the passes, besides the parameters."""
    net = of(*[nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(depth)])
    y = torch.compile(net, backend="aot_eager", fullgraph=True)(torch.randn(5, 8, dtype=torch.float64))
    own = {p.data_ptr() for p in net.parameters()}
    (saved,) = [t for t in y.grad_fn.saved_tensors if t.data_ptr() not in own]
    assert saved.data_ptr() == y.data_ptr()


@pytest.mark.parametrize("backend", ["graphs", pytest.param("inductor", marks=pytest.mark.slow)])
def test_sizes_that_follow_from_dynamic_ones(backend):
    """Inductor cannot compile a function by itself if a size is (s + 1) // 2. The blocks are part of the graph then."""
    blocks = [revflow.AdditiveCoupling(nn.Conv2d(2, 2, 3, padding=1)) for _ in range(2)]
    net = nn.Sequential(nn.Conv2d(2, 4, 3, stride=2, padding=1), revflow.ReversibleSequence(blocks))
    graphs = Graphs()
    compiled = torch.compile(net, backend=graphs if backend == "graphs" else backend, dynamic=True, fullgraph=True)
    for size in (8, 9), (11, 12):
        x = torch.randn(2, 2, *size, requires_grad=True)
        found = gradients(compiled, x, net)
        with revflow.ordinary_autograd():
            assert_close(found, gradients(net, x, net), 1e-5)
    assert graphs.regions == [[], []]


class Config:
    pass


def test_structures():
    assert structure_of(Scaled()) == structure_of(Scaled())
    norm = nn.BatchNorm1d(4)
    differing = [
        Scaled(),
        Scaled(1),
        Scaled(scale=(1.0, 2.0)),
        Scaled(function=torch.sin),
        Scaled(Config()),
        Scaled(Config()),
        Scaled().eval(),
        nn.Sequential(norm, nn.BatchNorm1d(4)),
        nn.Sequential(norm, norm),
        nn.Linear(4, 4, bias=False),
        nn.Linear(4, 4),
    ]
    assert len({*map(structure_of, differing)}) == len(differing)
    config = Config()
    assert structure_of(Scaled(config)) == structure_of(Scaled(config))


@pytest.mark.parametrize(
    ("kinds", "length"),
    [("a", 6), ("aaaa", 6), ("a" * 32, 4), ("a" * 12, 3), ("ab" * 6, 4), ("abc" * 4, 3), ("abcdefg", 6)],
)
def test_the_length_of_groups_makes_few_blocks_to_compile(kinds, length):
    assert length_of_groups(kinds) == length
