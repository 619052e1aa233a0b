"""verify(..., compiled=True): the compiled step is checked, and whatever runs outside of its graph is named."""

import re

import pytest
import torch
from torch import nn

import revflow
from engine.nets import Conditioner, Scale, additive, affine, image

GRAPHS_ONLY = {"backend": "aot_eager"}
"""Options with which PyTorch captures both passes and generates no code."""


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.manual_seed(0)
    yield
    torch.compiler.reset()


def of(*blocks):
    return revflow.ReversibleSequence(blocks)


def drops():
    return revflow.AdditiveCoupling(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Dropout(0.5)))


def test_by_inductor():
    """Dropout outside of the sequence draws the same numbers as without compilation."""
    conditioners = [nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)) for _ in range(2)]
    net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), of(*map(revflow.AdditiveCoupling, conditioners)))
    x, buffers = torch.randn(64, 3), [b.clone() for b in net.buffers()]
    state = torch.get_rng_state()
    report = revflow.verify(net, x, compiled=True)
    assert report.ok, report
    assert report.capture == (True, {})
    assert report.gradients.error < 1e-5
    assert 0 < report.drift.error < 1e-5 and report.drift.where == "input of sequence 2"
    assert report.kept.engine < report.kept.plain / 2 and report.peak.engine < report.peak.plain
    assert report.evaluations == {} and report.checkpoint is None
    lines = str(report).splitlines()
    assert lines[0] == "torch.compile    one graph"
    assert re.fullmatch(r"drift +max error \S+ of the largest stream \(input of sequence 2\)", lines[3])
    assert re.fullmatch(r"after forward +\S+ KiB; \S+ KiB under standard autograd without compilation", lines[4])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, buffers, net.buffers()))


class WrongInGraphs(revflow.AdditiveCoupling):
    """Its inverse is wrong in compiled code only, so that neither the engine nor a check of the block finds it."""

    @staticmethod
    def separate(y, shift):
        return y - (0.9 if torch.compiler.is_compiling() else 1) * shift


def test_a_fault_of_the_graph_is_a_problem():
    net, x = of(additive(), WrongInGraphs(Conditioner(4)), additive()), image(dtype=torch.float32)
    assert revflow.verify(net, x).ok
    report = revflow.verify(net, x, compiled=GRAPHS_ONLY)
    drift, gradient = report.problems
    assert re.match(r"the recomputed input of the sequence differs from the true one by .*would raise an error", drift)
    assert re.match(r"the gradient of .* is off by", gradient)
    assert report.drift.error > 1e-2 and report.gradients.error > 1e-2


def test_a_wrong_inverse_of_a_block_is_named():
    class WrongInverse(Scale):
        def inverse(self, *streams, **context):
            return tuple(s * 0.9 for s in super().inverse(*streams))

    report = revflow.verify(of(additive(), WrongInverse()), image(dtype=torch.float32), compiled=GRAPHS_ONLY)
    assert report.problems[0].startswith("the inverse of block 1 (WrongInverse) does not invert its forward")
    assert any("the recomputed input of the sequence differs" in problem for problem in report.problems)


def test_a_sequence_outside_of_the_graph_is_named_with_the_reason():
    """The others are still in graphs. PyTorch traces the network anew once its dropout is off."""
    net = nn.Sequential(of(additive()), of(drops())).double()
    report = revflow.verify(net, image(), compiled=GRAPHS_ONLY)
    assert not report.capture.one_graph and [*report.capture.outside] == ["1"]
    (problem,) = report.problems
    assert re.match(
        r"sequence 1 runs outside of the compiled graph, with the engine: block 0 \(AdditiveCoupling\): .* draws random numbers",
        problem,
    )
    assert str(report).startswith("torch.compile    1 sequence outside of the graph")
    assert report.gradients.error < 1e-10
    assert report.drift.where == "input of sequence 0"
    report = revflow.verify(net.eval(), image(), compiled=GRAPHS_ONLY)
    assert report.ok and report.capture == (True, {}), report


def test_a_reason_without_a_warning():
    class Scaled(Conditioner):
        def forward(self, x, factors):
            return super().forward(x) * factors[0]

    report = revflow.verify(
        of(revflow.AdditiveCoupling(Scaled(4))), image(dtype=torch.float32), factors=[2.0], compiled=GRAPHS_ONLY
    )
    (problem,) = report.problems
    assert problem.endswith("with the engine: a keyword argument is neither a tensor nor a number, a string or None")


def test_code_that_pytorch_does_not_trace_is_outside():
    report = revflow.verify(of(additive()), image(dtype=torch.float32), compiled={"disable": True})
    assert not report.capture.one_graph
    (problem,) = report.problems
    assert "the sequence runs outside of the compiled graph, with the engine: PyTorch did not trace it" in problem


def test_several_graphs():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.back, self.flow = of(additive()), of(affine())

        def forward(self, x, *, condition):
            y = self.back.inverse(x)
            torch.compiler.disable(print)(end="")
            return self.flow.forward_with_log_det(y, condition=condition)

    report = revflow.verify(Network().double(), image(), condition=image(1, 1, 1, 1), compiled=GRAPHS_ONLY)
    assert report.ok and report.capture == (False, {}), report
    assert str(report).startswith("torch.compile    several graphs")
    assert report.gradients.error < 1e-10 and report.drift.error < 1e-10
    (note,) = report.notes
    assert note.startswith("the network is not one graph, and fullgraph=True fails: ")


def test_a_sequence_that_runs_twice_has_no_drift():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = of(additive())

        def forward(self, x):
            return self.body(self.body(x))

    report = revflow.verify(Twice(), image(dtype=torch.float32), compiled=GRAPHS_ONLY)
    assert report.ok and report.drift is None and "drift" not in str(report)


def no_compiler(graph, inputs):
    raise OSError("No working C++ compiler found")


@pytest.mark.parametrize(
    ("net", "compiled", "error", "message"),
    [
        (
            lambda: of(additive()),
            "inductor",
            TypeError,
            "compiled must be True, False or a dictionary .*; got 'inductor'",
        ),
        (
            lambda: of(additive()),
            {"fullgraph": True},
            ValueError,
            "compiled must not contain fullgraph; got .* Remove it",
        ),
        (lambda: torch.compile(of(additive())), True, ValueError, "net must be a module that is not compiled yet; got"),
        (
            lambda: of(additive()),
            {"backend": no_compiler},
            RuntimeError,
            r"torch\.compile fails .* ReversibleSequence: .*No working C\+\+ compiler found\. PyTorch's compiler requires",
        ),
    ],
    ids=["type", "fullgraph", "compiled already", "no compiler"],
)
def test_errors(net, compiled, error, message):
    with pytest.raises(error, match=message):
        revflow.verify(net(), image(dtype=torch.float32), compiled=compiled)
