"""Two threads: masks of dropout are replayed, statistics move once, hooks run once, gradients are those of one thread."""

import copy
import threading
import time
from collections import defaultdict

import pytest
import torch
from torch import nn

import revflow
from engine.against_plain import Body, chain, recurrence, through_time
from engine.kinds import NETS, two
from engine.threads import Slow, gradients_of, in_threads, inputs

pytestmark = pytest.mark.filterwarnings("ignore:memory_budget")
STEPS = 4
WHOLE = [kind for kind in NETS if "chunks" not in kind]


class Masked(nn.Module):
    """Notes the masks that it draws in both evaluations."""

    def __init__(self, outputs=4):
        super().__init__()
        self.body, self.dropout, self.slow = Body(outputs), nn.Dropout(0.5), Slow()

    def forward(self, x):
        mask = self.slow(self.dropout(torch.ones_like(x)))
        place = threading.get_ident(), id(self), revflow.is_recomputing()
        MASKS[place].append((mask > 0).tolist())
        return self.body(x * mask)


MASKS = defaultdict(list)


def train(net, seed):
    return [gradients_of(net, inputs(seed)) for _ in range(STEPS)]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", [k for k in WHOLE if "budget" not in k])
def test_each_mask_is_drawn_once_and_replayed(kind, shared):
    MASKS.clear()
    nets = [NETS[kind](Masked) for _ in range(2)]
    in_threads(lambda: train(nets[0], 0), lambda: train(nets[not shared], 1))
    first = {place[:2]: masks for place, masks in MASKS.items() if not place[2]}
    assert len(first) == 2 * len([m for m in nets[0].modules() if isinstance(m, Masked)])
    per_step = 2 if "own" in kind else 1  # a block of one's own is inverted, and evaluated again
    for (thread, module), masks in first.items():
        assert MASKS[thread, module, True] == [m for m in masks for _ in range(per_step)]


class Meeting(revflow.AdditiveCoupling):
    """Goes on when another thread is in the midst of its second evaluation."""

    met = threading.Event()

    @staticmethod
    def combine(x, shift):
        Meeting.met.wait(5)
        return x + shift


def test_a_forward_pass_that_ends_while_another_thread_has_put_an_earlier_random_state_there():
    """The state that the other thread's second evaluation leaves for a time is the one before this pass's last draw."""
    may_begin, has_ended = threading.Event(), threading.Event()
    Meeting.met.clear()

    class Waiting(Body):
        def forward(self, x):
            x = nn.functional.dropout(x, 0.5)
            if revflow.is_recomputing():
                Meeting.met.set()
                has_ended.wait(0.3)
            return super().forward(x)

    class Dropping(Body):
        def forward(self, x):
            return super().forward(nn.functional.dropout(x, 0.5))

    slow, net, found = chain(Waiting, 1), chain(Dropping, 1, coupling=Meeting), []

    def wait():
        loss = slow(inputs(0)).square().sum()
        may_begin.set()
        time.sleep(0.05)  # the other thread draws next
        loss.backward()

    def step():
        may_begin.wait(5)
        loss = net(inputs(1)).square().sum()
        has_ended.set()
        found.append(torch.autograd.grad(loss, [*net.parameters()]))  # the guard raises if the mask is another

    in_threads(wait, step)
    assert found


LAYERS = {
    "batch norm": lambda: nn.BatchNorm1d(6),
    "spectral norm, frozen vectors": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)).eval(),
}


def with_layer(name):
    def make(outputs=4):
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), Slow(), LAYERS[name](), nn.Linear(6, outputs))

    return make


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kind", WHOLE)
def test_one_network_is_trained_with_hooks_in_two_threads(kind, name):
    net = NETS[kind](with_layer(name))
    twin, calls = copy.deepcopy(net), []
    for p in net.parameters():
        p.register_hook(lambda gradient: (calls.append(1), 2 * gradient)[1])
    found, buffers = {0: [], 1: []}, dict(net.named_buffers())
    in_threads(*[lambda k=k: found[k].extend(train(net, k)) for k in found])
    for k, its in found.items():
        expected = gradients_of(twin, inputs(k))
        for gradients in its:
            for f, e in zip(gradients, expected, strict=True):
                torch.testing.assert_close(f, 2 * e, rtol=1e-9, atol=1e-9)
    assert len(calls) == 2 * STEPS * len([*net.parameters()])
    for name, buffer in net.named_buffers():
        assert buffer is buffers[name]
        if name.endswith("num_batches_tracked"):
            # A block of one's own is run three times per step; its statistics, too, move once.
            assert buffer == 2 * STEPS, name


@pytest.mark.parametrize("states", ["kept", 2])
def test_two_recurrences_with_dropout(states):
    MASKS.clear()
    nets, loss_of = [recurrence(Masked, states) for _ in range(2)], through_time()
    in_threads(*[lambda net=net: loss_of(net).backward() for net in nets])
    for (thread, module, again), masks in [*MASKS.items()]:
        if not again:
            replayed = MASKS[thread, module, True]
            assert all(mask in masks for mask in replayed) and all(mask in replayed for mask in masks)


@pytest.mark.parametrize("kind", WHOLE)
def test_gradients_accumulate_from_two_threads(kind):
    net = NETS[kind](lambda *outputs: nn.Sequential(Body(*outputs), Slow()))
    twin = copy.deepcopy(net)
    in_threads(*[lambda k=k: [net(inputs(k)).square().sum().backward() for _ in range(STEPS)] for k in (0, 1)])
    for k in (0, 1):
        (STEPS * twin.plain(inputs(k)).square().sum()).backward()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9)


def test_a_network_with_dropout_is_trained_while_another_evaluates_and_draws():
    """Evaluation is without gradients; its own masks are drawn by the same generator."""
    MASKS.clear()
    net, other = two(Masked), two(lambda: nn.Sequential(Body(), nn.Dropout(0.5), Slow())).eval()
    expected, found = other(inputs(1)).detach(), []

    def evaluate():
        with torch.no_grad():
            found.extend(other(inputs(1)) for _ in range(STEPS))

    in_threads(lambda: train(net, 0), evaluate)
    assert all(torch.equal(y, expected) for y in found) and len(found) == STEPS
    assert all(m == MASKS[(*place[:2], True)] for place, m in [*MASKS.items()] if not place[2])
