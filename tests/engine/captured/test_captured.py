"""Sequences that torch.compile captures in training: one graph, whose backward pass recomputes the activations."""

import copy
import random

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import revflow
from engine.captured.graphs import Graphs, gradients
from engine.nets import STACKS, Conditioner, additive, assert_close, image, network, plain_inverse, weighted


class Halves(revflow.Bijection):
    """One stream to two."""

    def forward(self, *streams):
        return tuple(half.clone() for half in streams[0].chunk(2, 1))

    def inverse(self, *streams):
        return (torch.cat(streams, 1),)


stacks = pytest.mark.parametrize("stack", STACKS, ids=lambda s: s.__name__)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()  # otherwise, sizes that differ from those of another test are dynamic
    yield
    torch.compiler.reset()


def forward(net):
    return net


def plain(net):
    return net.plain


def assert_captured(net, x=None, run=forward, plain=plain, tolerance=1e-10, **context):
    """The compiled step agrees with the plain one, and its one graph recomputes: its backward part inverts blocks."""
    x = image().requires_grad_() if x is None else x
    graphs, twin = Graphs(), copy.deepcopy(net)
    found = gradients(torch.compile(run(net), backend=graphs, fullgraph=True), x, net, **context)
    assert_close(found, gradients(plain(twin), x, twin, **context), tolerance)
    assert len(graphs.forward) == len(graphs.backward) == 1
    assert graphs.recompute
    for buffer, its in zip(net.buffers(), twin.buffers(), strict=True):
        assert torch.allclose(buffer, its)


def with_log_det(net):
    def run(x):
        return net.forward_with_log_det(x)

    return run


def plain_with_log_det(net):
    def run(x):
        with revflow.ordinary_autograd():
            return net.forward_with_log_det(x)

    return run


class TestGradients:
    @stacks
    def test_forward(self, stack):
        assert_captured(network(stack))

    @stacks
    def test_inverse(self, stack):
        net = network(stack)
        y = net(image()).detach().requires_grad_()
        assert_captured(net, y, lambda net: lambda y: net.inverse(y), lambda net: lambda y: plain_inverse(net, y))

    @pytest.mark.parametrize("stack", STACKS[:-1], ids=lambda s: s.__name__)
    def test_log_determinants(self, stack):
        assert_captured(network(stack), None, with_log_det, plain_with_log_det)

    @pytest.mark.parametrize("stack", [STACKS[0], STACKS[4]], ids=lambda s: s.__name__)
    def test_by_inductor(self, stack):
        net, x = network(stack, dtype=torch.float32), image(dtype=torch.float32).requires_grad_()
        assert_close(gradients(torch.compile(net, fullgraph=True), x, net), gradients(net.plain, x, net), 1e-5)

    def test_under_autocast(self):
        net, x = network(STACKS[0], dtype=torch.float32), image(dtype=torch.float32).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            found = gradients(torch.compile(net, backend="aot_eager", fullgraph=True), x, net)
            assert_close(found, gradients(net.plain, x, net), 3e-2)
            with revflow.ordinary_autograd():
                assert torch.equal(found[0], net(x))

    def test_streams_of_their_own(self):
        net = network(STACKS[1])
        streams = tuple(s.clone().requires_grad_() for s in image().chunk(2, 1))
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
        found, expected = [
            torch.autograd.grad(weighted(torch.cat(run(streams), 1)), streams) for run in (compiled, net.plain)
        ]
        assert_close(found, expected)

    def test_streams_that_are_one_tensor(self):
        """Also gradients of two streams that are one tensor. Four groups of blocks share a function of different ones."""
        net = revflow.ReversibleSequence([additive() for _ in range(12)]).double()
        x = image().chunk(2, 1)[0].clone().requires_grad_()
        assert_captured(net, x, *[lambda net, call=call: lambda x: sum(call(net)((x, x))) for call in (forward, plain)])

    def test_channels_last(self):
        assert_captured(network(STACKS[0]), image().to(memory_format=torch.channels_last).requires_grad_())

    def test_parameters_without_gradients(self):
        net = network(STACKS[0])
        net[1].requires_grad_(False)
        net[0].F.first.weight.requires_grad_(False)
        assert_captured(net)

    def test_blocks_that_occur_more_than_once(self):
        torch.manual_seed(0)
        block = additive()
        assert_captured(revflow.ReversibleSequence([block, additive(), block]).double())

    def test_nested_sequences(self):
        torch.manual_seed(0)
        inner = revflow.ReversibleSequence([revflow.AdditiveCoupling(Conditioner(2))])
        blocks = [revflow.AdditiveCoupling(inner), revflow.ReversibleSequence([additive()])]
        assert_captured(revflow.ReversibleSequence(blocks).double())

    def test_blocks_that_change_the_number_of_streams(self):
        net = revflow.ReversibleSequence([Halves(), additive(), additive()]).double()
        x = image().requires_grad_()
        run = lambda net: lambda x: torch.cat(net((x,)), 1)  # noqa: E731
        assert_captured(net, x, run, lambda net: lambda x: torch.cat(net.plain((x,)), 1))
        y = torch.cat(net((x,)), 1).detach().requires_grad_()
        back = lambda net: lambda y: net.inverse(y.chunk(2, 1))[0]  # noqa: E731
        with_graph = lambda net: lambda y: plain_inverse(net, y)  # noqa: E731
        assert_captured(net, y, back, with_graph)

    def test_a_part_of_a_network(self):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(8, 8, 1), network(STACKS[0]), nn.Tanh()).double()

        def plain(x):
            with revflow.ordinary_autograd():
                return net(x)

        x = image().requires_grad_()
        found = gradients(torch.compile(net, backend="aot_eager", fullgraph=True), x, net)
        assert_close(found, gradients(plain, x, net))

    def test_batches_of_several_sizes_share_a_graph(self):
        """The second size makes the dimension dynamic."""
        net, graphs = network(STACKS[4]), Graphs()
        compiled = torch.compile(net, backend=graphs, fullgraph=True)
        for size in (2, 3, 5, 7):
            x = image(size, 8, 6, 4).requires_grad_()
            assert_close(gradients(compiled, x, net), gradients(net.plain, x, net))
        assert len(graphs.forward) == 2

    def test_under_ordinary_autograd(self):
        net, x, graphs = network(STACKS[0]), image().requires_grad_(), Graphs()
        compiled = torch.compile(net, backend=graphs, fullgraph=True)
        with revflow.ordinary_autograd():
            assert_close(gradients(compiled, x, net), gradients(net, x, net))
        assert graphs.regions == [[], []]
        gradients(compiled, x, net)
        assert graphs.recompute

    def test_without_gradients_of_the_input(self):
        net, x = network(STACKS[0]), image()
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
        found, expected = [torch.autograd.grad(weighted(run(x)), [*net.parameters()]) for run in (compiled, net.plain)]
        assert_close(found, expected)


class Body(nn.Module):
    """A convolution and a function."""

    def __init__(self, function=torch.tanh):
        super().__init__()
        self.layer, self.function = nn.Conv2d(4, 4, 3, padding=1), function

    def forward(self, x, **context):
        return self.function(self.layer(x), **context)


def of(*conditioners):
    torch.manual_seed(0)
    return revflow.ReversibleSequence([revflow.AdditiveCoupling(c) for c in conditioners]).double()


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * g * x


def normalized():
    return nn.Sequential(nn.Conv2d(4, 6, 1, bias=False), nn.BatchNorm2d(6), nn.SiLU(), nn.Conv2d(6, 4, 1))


class TestConditioners:
    def test_tensors_among_the_keyword_arguments(self):
        scale = image(2, 4, 1, 1).requires_grad_()
        net = of(*[Body(lambda h, scale, power: torch.tanh(h * scale) ** power) for _ in range(2)])
        assert_captured(net, scale=scale, power=3)

    def test_numbers_among_the_keyword_arguments(self):
        net, x = of(Body(lambda h, by: h * by)), image().requires_grad_()
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
        for by in (0.5, 0.7, 0.9, 2, 3, 4, True):
            assert_close(gradients(compiled, x, net, by=by), gradients(net.plain, x, net, by=by))

    @pytest.mark.parametrize("training", [True, False])
    def test_statistics_of_batches_move_once(self, training):
        """`assert_captured` compares the buffers."""
        net = of(normalized(), normalized()).train(training)
        before = [b.clone() for b in net.buffers()]
        assert_captured(net)
        assert any(not torch.equal(a, b) for a, b in zip(before, net.buffers(), strict=True)) == training

    @pytest.mark.parametrize(
        "make",
        [
            lambda: Body(Square.apply),
            lambda: parametrizations.weight_norm(nn.Conv2d(4, 4, 1)),
            lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1)),
            lambda: Body(lambda h: functional.scaled_dot_product_attention(h, h, h)),
            lambda: Body(lambda h: functional.dropout(h, 0.5, training=False)),
        ],
        ids=["autograd Function", "weight_norm", "inplace", "attention", "no dropout"],
    )
    def test_kinds(self, make):
        assert_captured(of(make(), make()))

    def test_both_modes_have_their_own_graph(self):
        net, x = of(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Dropout(0.5)), Body()), image().requires_grad_()
        compiled = torch.compile(net, backend=(graphs := Graphs()))
        for training in (False, True):
            net.train(training)
            torch.manual_seed(7)
            found = gradients(compiled, x, net)
            torch.manual_seed(7)
            assert_close(found, gradients(net.plain, x, net))
            assert graphs.recompute  # in eval mode, the first one


held, factor = [], image(4, 1, 1).requires_grad_()


class Caching(Body):
    def forward(self, x):
        self.hidden = self.layer(x)
        return torch.tanh(self.hidden)


class Checkpointed(Body):
    def forward(self, x):
        return torch.tanh(checkpoint(self.layer, x, use_reentrant=False))


def with_hook():
    body = Body()
    body.layer.register_forward_hook(lambda *_: None)
    return body


def compiled():
    body = Body()
    body.compile(backend="eager")
    return body


OBJECTIONS = {
    "F.dropout": (lambda: Body(lambda h: functional.dropout(h, 0.5)), "draws random numbers"),
    "rand_like": (lambda: Body(lambda h: h * torch.rand_like(h)), "draws random numbers.*rand_like"),
    "dropout_p": (
        lambda: Body(lambda h: functional.scaled_dot_product_attention(h, h, h, dropout_p=0.1)),
        "draws random numbers",
    ),
    "nn.Dropout": (lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.Dropout(0.5)), "draws random numbers"),
    "random": (lambda: Body(lambda h: h * random.random()), "draws random numbers"),
    "spectral_norm": (lambda: parametrizations.spectral_norm(nn.Conv2d(4, 4, 1)), "changes the buffer .*_u in place"),
    "a cache": (Caching, "stores a tensor in an attribute"),
    "a value": (lambda: Body(lambda h: h * (1 if h.sum().item() > 0 else 2)), "cannot be traced"),
    "a closure": (lambda: Body(lambda h: h * factor), "is not an argument, a parameter, a buffer or an attribute"),
    "a hook": (with_hook, "a Conv2d has hooks"),
    "a checkpoint": (Checkpointed, r"uses torch\.utils\.checkpoint"),
    "a compiled one": (compiled, "is compiled by itself"),
}


@pytest.mark.parametrize("kind", OBJECTIONS)
def test_what_cannot_be_captured_is_named_and_runs_in_the_engine(kind):
    make, reason = OBJECTIONS[kind]
    net, x = of(Body(), make()), image().requires_grad_()
    twin = copy.deepcopy(net)
    with pytest.raises(Exception, match=rf"(?s)outside of this compiled graph: block 1 \(AdditiveCoupling\).*{reason}"):
        torch.compile(net, backend="aot_eager", fullgraph=True)(x)
    torch.compiler.reset()
    if kind in ("a closure", "a cache", "random"):
        return  # the engine refuses these, or cannot repeat them
    graphs = Graphs()
    torch.manual_seed(7)
    with pytest.warns(UserWarning, match=f"outside of this compiled graph: block 1.*{reason}"):
        found = gradients(torch.compile(net, backend=graphs), x, net)
    torch.manual_seed(7)
    assert_close(found, gradients(twin.plain, x, twin))
    assert graphs.regions == [[], []]


def test_a_tensor_that_is_held_cannot_be_captured():
    net = of(Body(lambda h: (held.append(h), torch.tanh(h))[1]))
    with pytest.raises(Exception, match="is still held after its evaluation"):
        torch.compile(net, backend="aot_eager", fullgraph=True)(image().requires_grad_())
    held.clear()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"exact": True}, "exact arithmetic"),
        ({"chunks": 2}, "chunks"),
        ({"memory_budget": revflow.Budget("1MiB")}, "several modules share"),
    ],
)
def test_options_of_the_engine(options, reason):
    net = revflow.ReversibleSequence(list(network(STACKS[0])), **options)
    with pytest.raises(Exception, match=rf"outside of this compiled graph: .*{reason}"):
        torch.compile(net, backend="aot_eager", fullgraph=True)(image().requires_grad_())


def test_conditioners_that_share_statistics():
    conditioner = normalized()
    with pytest.raises(Exception, match="share a BatchNorm"):
        torch.compile(of(conditioner, conditioner), backend="aot_eager", fullgraph=True)(image().requires_grad_())


def test_tracing_changes_nothing():
    class Counting(Body):
        calls = 0

        def forward(self, x):
            if not torch.compiler.is_compiling():
                self.calls += 1
            self.seen = True
            return super().forward(x)

    net = of(nn.Sequential(normalized(), Counting()), Body(lambda h: functional.dropout(h, 0.5)))
    buffers, states = [b.clone() for b in net.buffers()], torch.get_rng_state()
    with pytest.raises(Exception, match="draws random numbers"):
        torch.compile(net, backend="aot_eager", fullgraph=True)(image().requires_grad_())
    assert all(map(torch.equal, buffers, net.buffers()))
    assert torch.equal(states, torch.get_rng_state())
    assert "seen" not in vars(net[0].F[1])


def test_an_older_release_runs_the_engine(monkeypatch):
    monkeypatch.setattr("revflow._captured.chain.CAN_BE_CAPTURED", False)
    net, x, graphs = network(STACKS[0]), image().requires_grad_(), Graphs()
    with pytest.warns(UserWarning, match=r"outside of compiled graphs with PyTorch .*: install 2\.13 or later"):
        found = gradients(torch.compile(net, backend=graphs), x, net)
    assert_close(found, gradients(net.plain, x, net))
    assert graphs.regions == [[], []]
    torch.compiler.reset()
    with pytest.raises(Exception, match=r"not part of compiled graphs before PyTorch 2\.13"):
        torch.compile(net, backend=graphs, fullgraph=True)(x)
