"""verify: a healthy network passes, a planted fault is named, and the network is left as it was."""

import copy
import random
import re

import pytest
import torch
from torch import nn

import revflow
from engine.nets import STACKS, Conditioner, Scale, additive, image, mixed, network, of_one


class Stateful(nn.Module):
    """Changes a tensor of its own in place that is not a buffer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.scale = torch.ones(())

    def forward(self, x):
        self.scale.mul_(1.1)
        return self.conv(x) * self.scale


class DrawsElsewhere(Conditioner):
    def forward(self, x):
        return super().forward(x) * random.random()


class WrongInverse(Scale):
    def inverse(self, *streams, **context):
        return tuple(s * 0.99 for s in super().inverse(*streams))


class OtherShape(Scale):
    def inverse(self, *streams, **context):
        return tuple(s[:, :2] for s in super().inverse(*streams))


class OtherCount(Scale):
    def inverse(self, *streams, **context):
        return super().inverse(*streams)[:1]


class NoGradient(torch.autograd.Function):
    """The identity, with a wrong gradient of the first run alone: what no comparison of streams can see."""

    @staticmethod
    def forward(ctx, x):
        ctx.factor = 0.5 if revflow.is_recomputing() else 1.0
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor


def of(block):
    torch.manual_seed(0)
    return revflow.ReversibleSequence([additive(4), block, additive(4)])


@pytest.mark.parametrize("stack", STACKS, ids=lambda s: s.__name__)
def test_a_healthy_network(stack):
    report = revflow.verify(network(stack, dropout=0.3), image())
    assert report.ok, report
    assert report.gradients.error < 1e-10 and report.reconstruction.error < 1e-10
    assert set(report.evaluations.values()) == ({2, 3} if stack is mixed else {2})
    assert "no problem found" in str(report)


@pytest.mark.parametrize("stack", STACKS, ids=lambda s: s.__name__)
def test_exact_arithmetic(stack):
    report = revflow.verify(revflow.ReversibleSequence(network(stack, dropout=0.3), exact=True), image())
    assert report.ok, report
    assert report.gradients.error == report.reconstruction.error == 0.0
    assert report.reconstruction.where.startswith("block")


def test_in_exact_arithmetic_an_inverse_that_loses_digits_is_a_problem():
    block = Scale()
    nn.init.constant_(block.log_scale, -1.0)
    assert revflow.verify(of(block).double(), image()).ok
    report = revflow.verify(revflow.ReversibleSequence(of(block).double(), exact=True), image())
    assert 0 < report.reconstruction.error < 1e-4
    assert any(re.search(r"inverse of block 1 \(Scale\) does not invert its forward", p) for p in report.problems), (
        report
    )


def test_bytes_are_those_of_measure_memory():
    net, x = revflow.ReversibleSequence(list(network(STACKS[0])), guard="off"), image().requires_grad_()
    report = revflow.verify(net, x)
    assert report.kept == (
        revflow.measure_memory(lambda: net(x)).kept,
        revflow.measure_memory(lambda: net.plain(x)).kept,
    )
    assert report.kept.engine < report.kept.plain and report.peak.engine > report.kept.engine


def test_a_network_with_sequences_inside_and_context():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3)
            self.body = network(STACKS[1], torch.float32)
            self.back = network(STACKS[2], torch.float32)

        def forward(self, x, *, condition):
            return self.back.inverse(self.body(self.stem(x), condition=condition))

    torch.manual_seed(0)
    report = revflow.verify(Network(), image(2, 3, 8, 6, dtype=torch.float32), condition=torch.ones(1, 1, 1, 1))
    assert report.ok, report
    assert "block body.0 (AdditiveCoupling).F" in report.evaluations


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        (
            revflow.AdditiveCoupling(Stateful()),
            r"block 1 .*not deterministic.*its own F\.scale in place.*register_buffer",
        ),
        (
            revflow.AdditiveCoupling(DrawsElsewhere(4)),
            "block 1 .*not deterministic.*random numbers that are not torch's",
        ),
        (WrongInverse(), r"inverse of block 1 \(WrongInverse\) does not invert its forward"),
        (OtherCount(), r"inverse of block 1 \(OtherCount\) must return 2 streams, .*; it returns 1"),
        (OtherShape(), r"inverse of block 1 \(OtherShape\) returns \(2, 2, 6, 4\) for \(2, 4, 6, 4\)"),
    ],
    ids=["stateful", "draws elsewhere", "wrong inverse", "other count", "other shape"],
)
def test_a_planted_fault_is_named(block, problem):
    report = revflow.verify(of(block), image(dtype=torch.float32))
    assert not report.ok
    with pytest.raises(AssertionError, match=problem):
        raise AssertionError(str(report))


def test_a_wrong_log_derivative_is_named():
    class WrongSign(revflow.AffineCoupling):
        @staticmethod
        def log_derivative(x, log_scale, shift):
            return -log_scale

    report = revflow.verify(of(WrongSign(Conditioner(4, 2))), image(dtype=torch.float32))
    (problem,) = report.problems
    assert re.match(
        r"log_derivative of block 1 \(WrongSign\) does not match its combine: .* off by \d\.\de[+-]0[01]", problem
    )


def test_a_log_derivative_of_another_shape_is_named():
    class Narrow(revflow.AffineCoupling):
        @staticmethod
        def log_derivative(x, log_scale, shift):
            return log_scale[:, :1]

    (problem,) = revflow.verify(of(Narrow(Conditioner(4, 2))), image(dtype=torch.float32)).problems
    assert problem == "log_derivative of block 1 (Narrow) returns (2, 1, 6, 4) for (2, 4, 6, 4)"


def test_a_value_that_is_no_number_is_no_lack_of_determinism():
    net = of(additive(4))
    with torch.no_grad():
        next(net[1].parameters()).fill_(torch.nan)
    problems = revflow.verify(net, image(dtype=torch.float32)).problems
    assert "block 1 (AdditiveCoupling) returns values that are not finite" in problems
    assert not any("deterministic" in problem or "float64" in problem for problem in problems)


def test_a_wrong_gradient_is_named():
    class Wrong(Conditioner):
        def forward(self, x):
            return super().forward(NoGradient.apply(x))

    report = revflow.verify(of(revflow.AdditiveCoupling(Wrong(4))), image(dtype=torch.float32))
    assert report.reconstruction.error < 1e-5
    (problem,) = report.problems
    assert re.fullmatch(
        r"the gradient of .* is off by [1-9]\.\de-0[12]; rounding errors .* by up to \d\.\de-0[5-8]\. "
        r"Repeat .* in float64: .*",
        problem,
    )


def test_what_is_no_number_is_a_problem():
    """Of which rounding errors move nothing."""

    class Rooted(Conditioner):
        def forward(self, x):
            return super().forward(x) + (x - x).sqrt()  # whose derivative at 0 is infinite

    report = revflow.verify(of(revflow.AdditiveCoupling(Rooted(4))), image(dtype=torch.float32))
    assert report.gradients.error == float("inf") and not report.ok


class Kinked(nn.Module):
    """k relu(x - x0): where x is x0, the last bit of x decides on the gradient."""

    def __init__(self, x0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((), 0.1))
        self.register_buffer("x0", x0)

    def forward(self, x):
        return self.weight * torch.relu(x - self.x0)


@pytest.mark.parametrize("exact", [False, True])
def test_a_kink_is_no_fault(exact):
    """The second conditioner reads what the third step's rewind has rebuilt, at its kink."""
    torch.manual_seed(0)
    first, third = (revflow.AdditiveCoupling(Conditioner(4)) for _ in range(2))
    x = image(dtype=torch.float32)
    with torch.no_grad():
        _, x0 = first(*x.chunk(2, 1))
    net = revflow.ReversibleSequence([first, revflow.AdditiveCoupling(Kinked(x0)), third], exact=exact)
    report = revflow.verify(net, x)
    assert report.ok, report
    if exact:
        assert report.gradients.error == 0 and not report.notes
    else:
        assert report.gradients.error > 1e-2
        assert re.search(r"the gradient of .*, but rounding errors .* activations with a kink", report.notes[0])


@pytest.mark.parametrize("guard", ["warn", "raise", "off"])
def test_what_training_refuses_is_a_problem(guard):
    parameter = nn.Parameter(torch.ones(()))

    class Closure(Conditioner):
        def forward(self, x):
            return super().forward(x) * parameter

    net = of(revflow.AdditiveCoupling(Closure(4)))
    net = revflow.ReversibleSequence(list(net), guard=guard)
    (problem,) = revflow.verify(net, image(dtype=torch.float32)).problems
    assert re.match(
        r"the guard ends the training step: block 1 \(AdditiveCoupling\): a conditioner uses a tensor", problem
    )


@pytest.mark.parametrize(("count", "others"), [(1, ""), (3, ", as do 2 other blocks")])
def test_changing_buffers_are_one_note(count, others):
    class Normalized(nn.Sequential):
        def __init__(self):
            super().__init__(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))

    net = revflow.ReversibleSequence([revflow.AdditiveCoupling(Normalized()) for _ in range(count)])
    report = revflow.verify(net, image(dtype=torch.float32))
    assert report.ok, report
    buffers = "F.0.running_mean, F.0.running_var, F.0.num_batches_tracked"
    expected = (
        f"block 0 (AdditiveCoupling) changes its buffers ({buffers}){others}; a training step applies this change once"
    )
    assert report.notes == (expected,)


def test_under_autocast():
    net, seen = network(mixed, torch.float32), set()
    net[0].F.last.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        report = revflow.verify(net, image(dtype=torch.float32))
    assert report.ok and seen == {torch.bfloat16}


def test_the_network_is_left_as_it_was():
    net, x = network(STACKS[0], torch.float32, dropout=0.5), image(dtype=torch.float32)
    net.append(revflow.AdditiveCoupling(nn.BatchNorm2d(4))).eval()
    net[0].train()
    before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    random_state = torch.get_rng_state()
    revflow.verify(net, x)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert modes == [m.training for m in net.modules()]
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_without_a_sequence():
    with pytest.raises(ValueError, match="none in this Conv2d"):
        revflow.verify(nn.Conv2d(1, 1, 1), torch.zeros(1, 1, 2, 2))


def test_a_network_with_a_budget_and_chunks():
    """What is reported is what will be trained; gradients are compared without chunks."""
    net, x = network(of_one(additive)), image()
    net.memory_budget = "1GiB"
    report = revflow.verify(net, x)
    assert set(report.evaluations.values()) == {1}
    assert report.gradients.error < 1e-10 and not report.problems
    assert report.kept.engine > 0.9 * report.kept.plain
    net.memory_budget = "min"
    net.chunks = 2
    report = revflow.verify(net, x)
    assert set(report.evaluations.values()) == {2}
    assert not report.problems and any("chunks" in note for note in report.notes)


class Rebinding(Conditioner):
    """Puts another tensor in the place of its own, which the second evaluation does not see."""

    def __init__(self):
        super().__init__(4)
        self.mean = torch.zeros(())

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
        return super().forward(x) + self.mean


def test_an_attribute_that_moves_once_a_step_is_a_note():
    report = revflow.verify(of(revflow.AdditiveCoupling(Rebinding())), image(dtype=torch.float32))
    assert report.ok and any("block 1 (AdditiveCoupling) changes its own F.mean" in note for note in report.notes)


class Cache:
    def __init__(self):
        self.seen = []


class Caching(Conditioner):
    def forward(self, x, cache):
        out = super().forward(x)
        cache.seen.append(out)
        return sum(cache.seen)


def test_state_in_the_context_is_named_and_the_callers_object_stays_empty():
    net, cache = revflow.ReversibleSequence([revflow.AdditiveCoupling(Caching(4))]), Cache()
    report = revflow.verify(net, image(dtype=torch.float32), cache=cache)
    assert any(re.search(r"block 0 .*changes cache\.seen\[0\]: state in the context", p) for p in report.problems)
    assert not any("float64" in p for p in report.problems)
    assert cache.seen == []


class Auxiliary(Conditioner):
    def forward(self, x):
        out = super().forward(x)
        self.loss = out.square().mean()
        return out


def test_a_loss_in_an_attribute_is_a_problem_also_in_a_network_that_holds_its_graph():
    net, x = revflow.ReversibleSequence([revflow.AdditiveCoupling(Auxiliary(4))]), image(dtype=torch.float32)
    net.plain(x)
    assert net[0].F.loss.grad_fn is not None  # PyTorch does not copy such tensors
    report = revflow.verify(net, x)
    assert any(re.search(r"block 0 .*attribute Auxiliary\.loss.*stream of its own", p) for p in report.problems)


@pytest.mark.parametrize(
    ("depth", "scale", "exact", "noted"),
    [(101, 1, False, True), (4, 1, False, False), (4, 100, False, True), (101, 1, True, False)],
)
def test_depth_and_growth_from_which_on_exact_arithmetic_is_advisable(depth, scale, exact, noted):
    torch.manual_seed(0)
    blocks = [revflow.AdditiveCoupling(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))) for _ in range(depth)]
    for block in blocks:
        block.F[1].weight.data.mul_(0.1 * scale**2)
    report = revflow.verify(revflow.ReversibleSequence(blocks, exact=exact, split_dim=-1), torch.randn(3, 8))
    assert any(f"{depth} blocks, in which" in note for note in report.notes) == noted
