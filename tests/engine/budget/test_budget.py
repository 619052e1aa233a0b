"""memory_budget: any schedule has plain's gradients, and none takes more than it was planned to."""

import warnings

import pytest
import torch
from torch import nn

import revflow
from engine.exactly import assert_equal, frames
from engine.exactly import network as exact_network
from engine.nets import (
    additive,
    assert_same_gradients,
    couplings,
    edge_to,
    evaluations,
    image,
    mixed,
    network,
    of_one,
    plain_inverse,
    stacks,
    weighted,
)
from revflow._base.free_memory import free_memory
from revflow._base.memory_size import parse
from revflow._budget.costs import Choice, Cost, SequenceMenu
from revflow._budget.selection import planned

HUGE = 2**40
STREAM = 2 * 4 * 12 * 12 * 8


def schedules(depth):
    """The first block that is stored, and the blocks before it of which the outputs are."""
    for k in range(depth, -1, -1):
        yield k, ()
        if k:
            yield k, range(k)
    yield depth, range(0, depth, 2)


def with_budget(stack, budget=HUGE):
    net = network(stack)
    net.memory_budget = budget
    return net


def train(net, x):
    y = net(x)
    sum(s.sum() for s in (y if isinstance(y, tuple) else (y,))).backward()


def peak_of(net, x, joined):
    """Of the chain alone: the loss has none of its own, and nobody holds the output."""
    seeds = [torch.randn_like(s) for s in ((x,) if joined else x)]
    for p in net.parameters():
        p.grad = torch.zeros_like(p)

    def step():
        y = net(x)
        edges = [edge_to(s) for s in ((y,) if joined else y)]
        del y
        torch.autograd.backward(edges, seeds)

    return revflow.measure_memory(step).peak


# What is given


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (0, 0),
        (10**9, 10**9),
        ("6GiB", 6 * 2**30),
        ("1.5 MiB", 3 * 2**19),
        (" 20 kB ", 20_000),
        ("3GB", 3 * 10**9),
        ("7B", 7),
        (0.8, 0.8),
        (1.0, 1.0),
        ("min", "min"),
        ("max", "max"),
    ],
)
def test_what_a_budget_may_be(given, expected):
    assert parse(given) == expected
    assert type(parse(given)) is type(expected)
    assert revflow.ReversibleSequence([], memory_budget=given).memory_budget == given


@pytest.mark.parametrize("given", [-1, 0.0, 1.5, -0.1, float("nan"), "6 gigs", "GiB", "", "-1GiB", "1e3MB", "most"])
def test_what_it_may_not_be(given):
    with pytest.raises(ValueError, match="memory_budget"):
        revflow.ReversibleSequence([], memory_budget=given)


@pytest.mark.parametrize("given", [None, "none", "all"])
def test_the_former_names_of_the_extremes(given):
    """The error names the new ones, wherever a budget is set."""
    net = revflow.ReversibleSequence([])
    message = f'memory_budget={given!r} is invalid: use "min" .* to recompute all activations, or "max" .* to store'
    for set_budget in (
        lambda: revflow.ReversibleSequence([], memory_budget=given),
        lambda: revflow.reversible([torch.nn.Linear(2, 2)], memory_budget=given),
        lambda: setattr(net, "memory_budget", given),
    ):
        with pytest.raises(ValueError, match=message):
            set_budget()
    assert net.memory_budget == "min"


@pytest.mark.parametrize("given", [True, [1], torch.tensor(3)])
def test_what_has_no_type_of_a_budget(given):
    with pytest.raises(TypeError, match="memory_budget"):
        revflow.ReversibleSequence([], memory_budget=given)


def test_a_share_is_of_what_is_free_when_it_is_first_needed(monkeypatch):
    free = [1000]
    monkeypatch.setattr("revflow._budget.keeper.free_memory", lambda device: free[0])
    net, x = with_budget(of_one(additive), 0.5), image()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert net.plan(x).budget == 500
        free[0] = 8000
        assert net.plan(x).budget == 500
    net.memory_budget = 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert net.plan(x).budget == 4000


def test_free_memory():
    assert 2**20 < free_memory(torch.device("cpu")) < 2**50
    with pytest.raises(RuntimeError, match="give bytes"):
        free_memory(torch.device("meta"))


# Which schedule


def by_hand():
    """Three blocks of streams of 10 bytes (20 for the pair), whose graphs are 5, 50 and 7, and largest gradients 3, 30 and 4."""
    costs = [
        Cost("0", "A", 5, 10, 20, 20, 20, anchors=0, transient=8, gradient=3, work=100, output=5, spared=40),
        Cost("1", "A", 50, 10, 20, 20, 20, anchors=2, transient=80, gradient=30, work=300, output=5, spared=30),
        Cost("2", "A", 7, 10, 20, 20, 20, anchors=0, transient=11, gradient=4, work=50),
    ]
    return SequenceMenu(costs, joined=False, rounded=False)


def test_a_menu_by_hand():
    menu = by_hand()
    all_kept = (
        (5 + 10) + (50 + 10) + 20 + 30
    )  # while block 1 is differentiated: what is kept up to there, gradients, the largest
    last_two = 20 + (50 + 10) + 20 + 30  # the first two streams are an anchor now
    block_1_rebuilt = 2 + 20 + 20 + 80  # its anchor, streams, gradients, and what it takes to undo it
    found = [menu.option(Choice(k)) for k in range(4)]
    assert [o.peak for o in found] == [all_kept, last_two, block_1_rebuilt, block_1_rebuilt]
    assert [o.held for o in found] == [20 + 5 + 10 + 50 + 10 + 7, 20 + 20 + 50 + 10 + 7, 20 + 2 + 20 + 7, 20 + 2]
    assert [o.spared for o in found] == [450, 350, 50, 0]
    # An output is alive until its own block is undone, and so while all later ones are. To undo that block takes no more
    # than without its output: the recomputed tensors are freed as the gradients are computed.
    for outputs, peak, held, spared in [({0}, 127, 27, 40), ({1}, 127, 27, 30), ({0, 1}, 132, 32, 70)]:
        choice = Choice(3, frozenset(outputs))
        assert menu.option(choice) == (choice, peak, held, spared)
    both = frozenset({0, 1})
    assert menu.option(Choice(2, both)) == (Choice(2, both), 132, 20 + 2 + 20 + 7 + 10, 50 + 70)
    # Recomputing all takes no less than storing the last block, which saves work.
    assert [o.choice for o in menu.by_peak] == [Choice(2), Choice(0)]
    # Per byte: 8 for the output of block 0, 6 for that of block 1, and 5.4 for all the rest at once. Storing the last block
    # alone would give 1.9.
    assert [o.choice for o in menu.by_held] == [Choice(3), Choice(3, frozenset({0})), Choice(3, both), Choice(0)]
    chosen = [planned([menu], b).options[0].choice.first_stored for b in (121, 122, 124, 125, 1000)]
    assert chosen == [3, 2, 2, 0, 0]


def test_a_step_of_two_calls_by_hand():
    """While the second call runs, what the first holds is alive."""
    menu, first, both = by_hand(), frozenset({0}), frozenset({0, 1})
    for budget, peak, spared, choices in [
        (0, 22 + 122, 0, (Choice(3), Choice(3))),
        (143, 144, 0, (Choice(3), Choice(3))),
        (144, 144, 50, (Choice(3), Choice(2))),
        (147, 22 + 125, 450, (Choice(3), Choice(0))),
        (152, 27 + 125, 490, (Choice(3, first), Choice(0))),
        (156, 152, 490, (Choice(3, first), Choice(0))),
        (157, 32 + 125, 520, (Choice(3, both), Choice(0))),
        (226, 157, 520, (Choice(3, both), Choice(0))),
        (227, 102 + 125, 900, (Choice(0), Choice(0))),
    ]:
        plan = planned([menu, menu], budget)
        assert (plan.peak, plan.spared, tuple(o.choice for o in plan.options)) == (peak, spared, choices)


def test_an_output_is_stored_only_if_it_saves_more_than_its_hooks_cost(monkeypatch):
    """The last of two blocks is stored: that takes no more than to invert it. The first one's output saves 50 of 100."""
    costs = [
        Cost(str(k), "A", 400, 10, 20, 20, 20, anchors=0, transient=400, gradient=0, work=100, output=5, spared=50)
        for k in range(2)
    ]
    for hooks, outputs in ((0, {0}), (49, {0}), (50, set()), (60, set())):
        monkeypatch.setattr("revflow._budget.costs.HOOKS", hooks)
        menu = SequenceMenu(costs, joined=False, rounded=False)
        (option,) = planned([menu], menu.least.peak + 5).options
        assert option.choice == Choice(1, frozenset(outputs))
        assert option.spared == 100 + (50 - hooks if outputs else 0)


def test_an_empty_sequence_and_one_of_no_gradient():
    x = image()
    net = revflow.ReversibleSequence([], memory_budget=HUGE)
    for _ in range(2):
        assert torch.equal(net(x), x)
    assert str(net.plan(x))
    net = with_budget(of_one(additive)).requires_grad_(False)
    for _ in range(2):
        assert not net(x).requires_grad


# Gradients


@stacks
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_gradients_are_those_of_plain_at_every_schedule(stack, inverse, keep_from):
    net = with_budget(stack)
    x = (net.plain(image()).detach() if inverse else image()).requires_grad_()
    run = (lambda: net.inverse(x)) if inverse else (lambda: net(x))
    plain = (lambda: plain_inverse(net, x)) if inverse else (lambda: net.plain(x))
    for k, outputs in schedules(len(net)):
        keep_from(k, outputs)
        assert_same_gradients(net, run, plain, [x])


@stacks
def test_evaluations_at_every_schedule(stack, keep_from):
    net, x = with_budget(stack), image()
    step = lambda: train(net, x)  # noqa: E731
    assert all(n == 2 for block in evaluations(net, step) for n in block)  # which measures
    for k, outputs in schedules(len(net)):
        keep_from(k, outputs)
        found = evaluations(net, step)
        assert all(n == 2 for block in found[:k] for n in block), k
        assert all(n == 1 for block in found[k:] for n in block), k


@stacks
def test_log_determinants_at_every_schedule(stack, keep_from):
    net, x = with_budget(stack), image().requires_grad_()

    def run():
        y, log_det = net.forward_with_log_det(x)
        return torch.cat((y.flatten(1), log_det[:, None]), 1)

    def plain():
        with revflow.ordinary_autograd():
            return run()

    for k, outputs in schedules(len(net)):
        keep_from(k, outputs)
        assert_same_gradients(net, run, plain, [x])


@stacks
@pytest.mark.parametrize("low", [False, True], ids=["float32", "autocast"])
def test_exact_gradients_are_the_same_bits_at_every_schedule(stack, low, keep_from):
    net, x = exact_network(stack), frames().requires_grad_()
    net.memory_budget = HUGE
    wanted = [x, *net.parameters()]

    def gradients(run):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            y = run(x)
        return [y, *torch.autograd.grad(weighted(y), wanted)]

    expected = gradients(net.plain)
    for k, outputs in schedules(len(net)):
        keep_from(k, outputs)
        assert_equal(gradients(net), expected)


@pytest.mark.parametrize(("k", "outputs"), [(0, ()), (3, ()), (8, ()), (3, (0, 1, 2)), (8, (0, 2, 5, 6))])
def test_dropout_batch_norm_and_the_random_state(k, outputs, keep_from):
    """Each step, also the one that measures, draws and counts as plain's."""
    results = []
    for budget in ("max", HUGE):
        net, x = network(lambda: [*mixed(dropout=0.5)]), image().requires_grad_()
        conditioner = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)).double()
        net.insert(0, revflow.AdditiveCoupling(conditioner))
        net.memory_budget = budget
        keep_from(k, outputs)
        torch.manual_seed(3)
        found = []
        for _ in range(3):
            y = net(x)
            found += [y, *torch.autograd.grad(weighted(y), [x, *net.parameters()]), torch.rand(1)]
        results.append([*found, *(b.double() for b in net.buffers())])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_context_frozen_blocks_and_tuples(keep_from):
    net, x, c = with_budget(of_one(additive)), image().requires_grad_(), image(2, 6, 1, 1, seed=2).requires_grad_()
    net[1].requires_grad_(False)
    for k, outputs in schedules(3):
        keep_from(k, outputs)
        assert_same_gradients(net, lambda: net(x, condition=c), lambda: net.plain(x, condition=c), [x, c])
        streams = lambda f: torch.cat(f(x.chunk(2, 1), condition=c), 1)  # noqa: E731
        assert_same_gradients(net, lambda f=streams: f(net), lambda f=streams: f(net.plain), [x, c])


def test_max_is_ordinary_autograd():
    net, x = with_budget(of_one(additive), "max"), image().requires_grad_()
    assert all(n == [1] for n in evaluations(net, lambda: net(x).sum().backward()))
    (first,) = torch.autograd.grad(net(x).pow(3).sum(), x, create_graph=True)
    torch.autograd.grad(first.sum(), x)  # which a chain that is rebuilt refuses


# Memory


@couplings
@pytest.mark.parametrize("joined", [True, False], ids=["tensor", "tuple"])
def test_no_budget_is_exceeded_by_more_than_a_transient(make, joined):
    torch.manual_seed(0)
    net = revflow.ReversibleSequence([make() for _ in range(6)], guard="off").double()
    x = image(2, 8, 12, 12) if joined else (image(2, 4, 12, 12), image(2, 4, 12, 12, seed=2))
    least = net.plan(x).peak
    at_min = peak_of(net, x, joined)
    with revflow.ordinary_autograd():
        plain = peak_of(net, x, joined)
    kept = set()
    for share in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2):
        net.memory_budget = budget = int(max(at_min, least) + share * (plain - at_min))
        train(net, x)
        plan, found = net.plan(x), peak_of(net, x, joined)
        kept.add(plan.kept)
        assert plan.peak <= budget
        assert found <= budget + plan.transient
        assert abs(found - plan.peak) <= 3 * STREAM < plan.transient
    assert {6} < kept
