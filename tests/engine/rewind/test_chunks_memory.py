"""Exact arithmetic, memory and budgets, with chunks."""

import pytest
import torch
from torch import nn

import revflow
from engine.exactly import assert_equal, frames, watch
from engine.exactly import network as exact_network
from engine.exactly import stacks as exact_stacks
from engine.nets import (
    Scale,
    additive,
    additive_two,
    affine,
    assert_close,
    assert_same_gradients,
    conditioners,
    couplings,
    evaluations,
    gated,
    gated_two,
    image,
    of_one,
    peak,
)
from engine.slices import BATCH, Norms, batch, few_stacks, gradients_of, in_slices, per_sample, sliced

# Exact arithmetic


@exact_stacks
@pytest.mark.parametrize("low", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_exact(stack, low, inverse):
    """What is rebuilt is what was there, to the last bit; gradients are near."""
    net, x = exact_network(stack), frames(BATCH, 8, 6, 4)
    x = (net.plain(x) if inverse else x).detach().requires_grad_()
    net.chunks = 2
    function = net.inverse if inverse else net
    wanted = [x, *net.parameters()]
    with torch.autocast("cpu", torch.bfloat16, enabled=low, cache_enabled=False):
        function(x).sum().backward()
        given, again = watch(net)
        found = gradients_of(function(x), wanted)
        assert len(given) == 2 * len(conditioners(net)) == len(again)
        pairs = [pair for k in range(0, len(again), 2) for pair in reversed(again[k : k + 2])]
        assert_equal([a for args in given for a in args], [a for args in reversed(pairs) for a in args])
        oracle = in_slices(net)
        plain = revflow.ReversibleSequence(oracle, exact=True)
        with revflow.ordinary_autograd():
            expected = gradients_of((plain.inverse if inverse else plain)(x), wanted)
    assert_equal(found[:1], expected[:1])
    assert_close(found[1:], expected[1:], 0.02 if low else 1e-5)
    if not (low or inverse):
        assert_close(found, gradients_of(net.plain(x), wanted), 1e-5)


def test_exact_residuals_of_slices():
    """Two tensors a slice; and gates that shut, whose values are kept whole."""
    torch.manual_seed(0)
    blocks = [gated(4), affine(4), gated_two(4)]
    for block in blocks:
        for conditioner in block.children():
            conditioner.register_forward_hook(lambda m, args, out: (20 * torch.tanh(4 * out[0]), out[1].tanh()))
    net, x = (
        revflow.ReversibleSequence([blocks[0], blocks[2]], exact=True, chunks=3),
        frames(BATCH, 8, 6, 4).requires_grad_(),
    )
    net(x).sum().backward()
    given, again = watch(net)
    y = net(x)
    torch.autograd.grad(y.sum(), x, retain_graph=True)
    first = [*again]
    again.clear()
    torch.autograd.grad(y.sum(), x)
    assert_equal([a for (a,) in again], [a for (a,) in first])
    for k in range(0, len(given), 3):
        rows = torch.cat([a for (a,) in given[k : k + 3]])
        end = len(again) - k
        assert_equal([torch.cat([a for (a,) in again[end - 3 : end]])], [rows])


# Memory


def kept(net, x, **context):
    return revflow.measure_memory(lambda: net(x, **context)).kept


@pytest.mark.parametrize("chunks", [2, 3])
def test_what_is_kept_between_forward_and_backward(chunks):
    x = image(8, 8, 6, 4)
    for depth in (2, 8):
        for make, more in ((additive, 0), (additive_two, 0), (affine, 0), (gated, depth), (gated_two, 2 * depth)):
            torch.manual_seed(0)
            net = revflow.ReversibleSequence([make() for _ in range(depth)], chunks=chunks, guard="off").double()
            assert kept(net, x) == (2 + more) * x.nbytes // 2
            assert revflow.measure_memory(lambda net=net: net.inverse(x)).kept == x.nbytes


@couplings
def test_a_training_step_leaves_nothing(make):
    net, x, c = sliced(of_one(make), 3, dropout=0.3), image(BATCH, 8, 6, 4), per_sample()

    def step():
        net(x, condition=c).sum().backward()
        net.zero_grad()
        c.grad = None

    step()
    assert revflow.measure_memory(step).kept == 0


HIDDEN = 4


def wide(kind, count, chunks, outputs):
    """Conditioners whose activations are `HIDDEN` times a stream, twice."""
    torch.manual_seed(0)
    return revflow.ReversibleSequence(
        [kind(*[Wide(outputs) for _ in range(count)]) for _ in range(3)],
        chunks=chunks,
        guard="off",
    )


class Wide(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.first, self.last = nn.Conv2d(8, 8 * HIDDEN, 1), nn.Conv2d(8 * HIDDEN, 8 * outputs, 1)
        self.outputs = outputs

    def forward(self, x):
        out = self.last(nn.functional.silu(self.first(x)))
        return out if self.outputs == 1 else out.chunk(self.outputs, 1)


@pytest.mark.parametrize(
    ("kind", "count", "streams"),
    [
        (revflow.AdditiveCoupling, 1, {2: 11.5, 16: 5.8125}),
        (revflow.AdditiveCoupling, 2, {2: 12.5, 16: 6.8125}),
        (revflow.AffineCoupling, 1, {2: 14, 16: 7}),
        (revflow.AffineCoupling, 2, {2: 16, 16: 9}),
        (revflow.GatedCoupling, 1, {2: 15.5, 16: 8.9375}),
    ],
)
def test_the_peak_falls_with_the_number_of_slices(kind, count, streams):
    """Of a slice is what a conditioner has for itself, its graph and the gradients in that: 12 streams or more of all samples."""
    x, outputs = image(16, 16, 16, 16, dtype=torch.float32), len(kind.coefficients)
    for chunks, expected in streams.items():
        net = wide(kind, count, chunks, outputs)
        its_gradients = sum(p.nbytes for p in net[0].F.parameters())
        assert 0 <= peak(net, x) - expected * x.nbytes / 2 <= 6 * its_gradients


# With a memory budget


@few_stacks
def test_kept_blocks_run_whole_and_once(stack, keep_from):
    net, x, c = sliced(stack, 5), batch(), per_sample()
    net.memory_budget = 2**40
    run = lambda: net(x, condition=c)  # noqa: E731
    run()
    for k in range(len(net), -1, -1):
        keep_from(k)
        found = evaluations(net, lambda: run().sum().backward())
        assert all(n == 10 for block in found[:k] for n in block), k
        assert all(n == 1 for block in found[k:] for n in block), k
        assert_same_gradients(net, run, lambda: net.plain(x, condition=c), [x, c])


def test_batch_norm_behind_what_is_rebuilt(keep_from):
    """A step that measures rebuilds every block: refused there, and where it is rebuilt."""
    torch.manual_seed(0)
    net = revflow.ReversibleSequence(
        [additive(), revflow.AdditiveCoupling(Norms(nn.BatchNorm2d(4)))], chunks=2
    ).double()
    net.memory_budget = "1GiB"
    with pytest.raises(ValueError, match=r"block 1 .*mixes the samples"):
        net(batch())
    net.memory_budget = "max"
    net(batch()).sum().backward()


@couplings
@pytest.mark.parametrize("guard", ["off", "warn"])
def test_a_first_step_measures_as_a_plan_does(make, guard):
    """Also where it looks for mixed samples on the way."""
    torch.manual_seed(0)
    net = revflow.ReversibleSequence([make() for _ in range(3)], guard=guard, chunks=2, memory_budget="1GiB").double()
    x = image(4, 8, 12, 12).requires_grad_()
    net(x).sum().backward()
    (measured,) = net._keeper._menus.values()
    assert measured.menu.costs == net.plan(x).costs
    assert all(cost.graph > 0 for cost in measured.menu.costs)


def test_other_chunks_are_measured_anew():
    net, x = sliced(of_one(additive), 2), batch()
    net.memory_budget = "1GiB"
    net(x).sum().backward()
    for chunks in (3, 5):
        net.chunks = chunks
        for expected in (2 * chunks, 1):  # measured, kept
            assert evaluations(net, lambda: net(x).sum().backward()) == [[expected]] * 3


@pytest.mark.parametrize("make", [additive_two, affine, gated], ids=lambda m: m.__name__)
@pytest.mark.parametrize("chunks", [2, 16])
def test_no_budget_is_exceeded_by_more_than_a_transient(make, chunks):
    torch.manual_seed(0)
    net = revflow.ReversibleSequence([make() for _ in range(5)], guard="off", chunks=chunks).double()
    x, stream = image(4, 8, 12, 12), 4 * 4 * 12 * 12 * 8
    net.memory_budget = "min"
    at_min = peak(net, x)
    with revflow.ordinary_autograd():
        plain = peak(net, x)
    least, schedules = net.plan(x).peak, set()
    for share in (0.0, 0.6, 1.2):
        net.memory_budget = budget = int(max(at_min, least) + share * (plain - at_min))
        net(x).sum().backward()
        plan, found = net.plan(x), peak(net, x)
        schedules.add(plan.kept)
        assert plan.peak <= budget
        assert found <= budget + plan.transient
        assert abs(found - plan.peak) <= 3 * stream
    assert {5} < schedules


def test_blocks_that_are_not_sliced_cost_what_they_cost():
    """Of their gradient; and a batch has no more slices than samples."""

    class Whole(Scale):
        def forward(self, *streams):
            return tuple((s * self.log_scale.exp()).clone() for s in streams)

    x = image(2, 8, 6, 4)
    costs = []
    for chunks in (1, 2, 50):
        torch.manual_seed(0)
        net = revflow.ReversibleSequence([Whole(), additive()], guard="off", chunks=chunks).double()
        costs.append(net.plan(x).costs)
    for whole, sliced_in_two, in_fifty in zip(*costs, strict=True):
        assert sliced_in_two == in_fifty
        assert whole.gradient == sliced_in_two.gradient
    assert costs[0][0] == costs[1][0]
