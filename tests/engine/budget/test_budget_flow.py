"""memory_budget in a training loop: many calls, other kinds of input, checkpoints, hooks."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import revflow
from engine.budgets import between, sequence, train
from engine.nets import (
    Conditioner,
    additive,
    affine,
    assert_close,
    assert_same_gradients,
    evaluations,
    gated,
    image,
    weighted,
)

STREAMS = image().nbytes


def kept_in(net, x):
    return sum(n == [1] for n in evaluations(net, lambda: train(net, x)))


def peak_of(net, step, *inputs):
    for leaf in (*inputs, *net.parameters()):
        leaf.grad = torch.zeros_like(leaf)
    return revflow.measure_memory(step).peak


# What is held


@pytest.mark.parametrize("make", [additive, gated], ids=["additive", "gated"])
@pytest.mark.parametrize("joined", [True, False], ids=["tensor", "tuple"])
def test_what_a_call_holds_is_what_it_is_said_to_hold(make, joined, keep_from):
    """At every schedule, also in the step that measures."""
    net, pair = sequence(make), (image(2, 4, 6, 4), image(2, 4, 6, 4, seed=2))
    x = image().requires_grad_() if joined else tuple(s.requires_grad_() for s in pair)
    ys = []
    for k, outputs in [
        (4, ()),
        (4, (0, 2)),
        (4, range(4)),
        (3, (1,)),
        (3, ()),
        (2, (0, 1)),
        (2, ()),
        (1, (0,)),
        (1, ()),
        (0, ()),
    ]:
        keep_from(k, outputs)
        ys.clear()
        report = revflow.measure_memory(lambda: ys.append(net(x)))
        # Streams of a tuple that blocks pass on are counted, though they are the caller's.
        assert report.kept <= net._keeper.in_use <= report.kept + (0 if joined else 2 * STREAMS), k
    ys.clear()
    assert net._keeper.in_use == len(net._keeper._pending) == 0


def test_a_log_determinant_alone_holds_as_much():
    net, x = sequence(affine), image().requires_grad_()
    for _ in range(3):
        y, log_det = net.forward_with_log_det(x)
        held = net._keeper.in_use
        del y
        assert net._keeper.in_use == held > 0
        log_det.sum().backward()
        assert net._keeper.in_use == 0


@pytest.mark.parametrize("make", [additive, gated], ids=["additive", "gated"])
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("order", ["one after the other", "first in, first out", "last in, first out"])
def test_many_calls_before_one_backward_pass(make, count, share, order):
    """The budget is for all of them, as soon as one step has shown how many there are."""
    net, x = sequence(make, 8), image(2, 8, 12, 12).requires_grad_()
    net.memory_budget = "max"
    most = net.plan(x).peak
    net.memory_budget = "min"
    rebuilt = net.plan(x)
    net.memory_budget = budget = int(count * (rebuilt.peak + share * (most - rebuilt.peak)))

    def step():
        if order == "one after the other":
            y = x
            for _ in range(count):
                y = net(y)
            y.sum().backward()
        else:
            ys = [net(x) for _ in range(count)]
            while ys:
                ys.pop(-(order[0] == "l")).sum().backward()

    step()
    found = peak_of(net, step, x)
    assert found <= budget + rebuilt.transient + x.nbytes  # the loop's own variable
    assert net._keeper.in_use == 0
    if share:
        assert any(n[0] < 2 * count for n in evaluations(net, step))


def test_room_is_left_for_calls_to_come():
    net, x = sequence(), image()
    between(net, x, 0.6)
    train(net, x)
    alone = kept_in(net, x)
    ys = [net(x) for _ in range(3)]  # more than there ever were: rebuilt
    sum(y.sum() for y in ys).backward()
    del ys
    assert 0 <= kept_in(net, x) < alone


# Which kind of input


def test_flags_that_move_from_block_to_block():
    """As many parameters that want gradients, and as many modules in train mode, but others."""
    net, x = sequence(depth=2), image().requires_grad_()
    net[0].requires_grad_(False)
    assert [kept_in(net, x) for _ in range(2)] == [0, 2]
    net[0].requires_grad_(True)
    net[1].requires_grad_(False)
    assert [kept_in(net, x) for _ in range(2)] == [0, 2]
    net[1].F.dropout.eval()
    assert [kept_in(net, x) for _ in range(2)] == [0, 2]


def test_copies_measure_their_own_blocks():
    net, x = sequence(), image()
    train(net, x)
    assert net._keeper._menus
    assert not copy.deepcopy(net)._keeper._menus


def test_a_sequence_within_a_conditioner_is_planned_as_it_is_rebuilt():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.chain = revflow.ReversibleSequence([additive(2) for _ in range(6)])

        def forward(self, x):
            return self.chain(x)

    net, x = sequence(lambda: revflow.AdditiveCoupling(Deep()), 3), image().requires_grad_()
    for share in (0.0, 0.5, 1.0):
        between(net, x, share)
        train(net, x)
        plan = net.plan(x)
        found = peak_of(net, lambda: train(net, x), x)
        assert found <= max(net.memory_budget, plan.peak) + plan.transient


# Checkpoints and other hooks for what is saved


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.filterwarnings("ignore:memory_budget")
def test_checkpoint(reentrant, share):
    """From the first step on, and where other calls hold memory in one of its two runs."""
    net, x = sequence(), image().requires_grad_()
    expected = torch.autograd.grad(weighted(net.plain(x)), [x, *net.parameters()])
    between(net, x, share)

    def found(pending):
        net.zero_grad()
        x.grad = None
        y = checkpoint(net, x, use_reentrant=reentrant)
        other = net(x) if pending else None
        weighted(y).backward()
        del other
        assert net._keeper.in_use == 0
        return [x.grad, *(p.grad for p in net.parameters())]

    for pending in (False, True, False):
        assert_close(found(pending), expected)


def test_save_on_cpu_rebuilds():
    net, x = sequence(), image().requires_grad_()
    train(net, x)
    assert kept_in(net, x) == 4

    def step():
        with torch.autograd.graph.save_on_cpu():
            y = net(x)
        y.sum().backward()

    assert evaluations(net, step) == [[2]] * 4
    assert net._keeper.in_use == 0
    assert kept_in(net, x) == 4


def test_checkpoints_in_conditioners():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Conditioner(4, dropout=0.5)

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    net = sequence(lambda: revflow.AdditiveCoupling(Checkpointed()))
    x = image().requires_grad_()
    for _ in range(3):
        assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [x])
    assert net._keeper.in_use == 0


# Hooks


def test_hooks_run_once_where_kept_and_twice_where_rebuilt():
    net, x, calls = sequence(), image().requires_grad_(), []
    between(net, x, 0.6)
    for k, block in enumerate(net):
        block.register_forward_hook(lambda *_, k=k: calls.append(("block", k)))
        block.register_full_backward_hook(lambda *_, k=k: calls.append(("backward", k)))
        block.F.register_forward_hook(lambda *_, k=k: calls.append(("conditioner", k)))
        block.F.first.weight.register_hook(lambda _, k=k: calls.append(("gradient", k)))
        block.F.first.weight.register_post_accumulate_grad_hook(lambda _, k=k: calls.append(("accumulated", k)))
    kept, outputs = 0, net.plan(x).outputs_kept
    net.memory_budget = net.memory_budget  # measured again
    for step in range(3):
        calls.clear()
        kept = kept_in(net, x)
        assert (kept == 0) == (step == 0)  # which measures
        for k in range(4):
            for name in ("block", "backward", "gradient", "accumulated"):
                assert calls.count((name, k)) == 1, (name, k)
            # The second evaluation of one whose output is stored stops before it returns.
            runs_once = step > 0 and (k >= 4 - kept or k in outputs)
            assert calls.count(("conditioner", k)) == (1 if runs_once else 2)
    assert 0 < kept < 4
