"""memory_budget over many calls: what is measured when, what is held, what is told."""

import copy
import gc
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

import revflow
from engine.nets import Conditioner, additive, assert_same_gradients, conditioners, evaluations, image
from revflow._base.memory_size import size
from revflow._rewind.chain import ChainCall

HUGE = 2**40


def sequence(budget=HUGE, depth=4, **options):
    torch.manual_seed(0)
    return revflow.ReversibleSequence([additive() for _ in range(depth)], memory_budget=budget, **options).double()


def halfway(net, x):
    """The bytes that half of the blocks take."""
    net.memory_budget = "max"
    everything = net.plan(x).peak
    net.memory_budget = "min"
    return (net.plan(x).peak + everything) // 2


def kept_in(net, run):
    """How many blocks run once in `run()`."""
    return sum(n == [1] for n in evaluations(net, run))


def train(net, x):
    net(x).sum().backward()


# What is measured


def test_each_kind_of_input_is_measured_once():
    net = sequence()
    small, large = image(), image(3, 8, 10, 10)

    def under_autocast(x):
        with torch.autocast("cpu", torch.bfloat16):
            y = net(x)
        y.sum().backward()

    for x in (small, large):
        assert kept_in(net, lambda x=x: train(net, x)) == 0
        assert kept_in(net, lambda x=x: train(net, x)) == 4
    assert kept_in(net, lambda: train(net, small)) == 4
    net.float()
    small = small.float()
    assert [kept_in(net, lambda: under_autocast(small)) for _ in range(2)] == [0, 4]
    net.eval()
    assert [kept_in(net, lambda: train(net, small)) for _ in range(2)] == [0, 4]
    net[0].requires_grad_(False)
    net(small).sum().backward()
    assert kept_in(net, lambda: train(net, small)) == 4


def test_another_way_through_a_conditioner_is_another_kind():
    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.short, self.long = nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 50), nn.Tanh(), nn.Linear(50, 3))

        def forward(self, x, deep, number):
            return (self.long if deep else self.short)(x) * number

    net = revflow.ReversibleSequence([revflow.AdditiveCoupling(Either()) for _ in range(4)], memory_budget=HUGE)
    plans = [net.plan(torch.randn(5, 6), deep=deep, number=2.0) for deep in (False, True)]
    assert plans[0].peak < plans[1].peak
    assert len(net._keeper._menus) == 2
    for number in (1.0, 3.0, 4):
        net.plan(torch.randn(5, 6), deep=True, number=number)
    assert len(net._keeper._menus) == 2


def test_a_changed_chain_is_measured_again():
    net, x = sequence(), image()
    train(net, x)
    assert kept_in(net, lambda: train(net, x)) == 4
    net.append(additive().double())
    assert kept_in(net, lambda: train(net, x)) == 0
    net[0] = additive().double()
    assert kept_in(net, lambda: train(net, x)) == 0
    assert kept_in(net, lambda: train(net, x)) == 5
    net.memory_budget = HUGE  # set again: all is forgotten
    assert kept_in(net, lambda: train(net, x)) == 0


def test_ever_other_shapes_do_not_pile_up(monkeypatch):
    monkeypatch.setattr("revflow._budget.keeper._MOST_KINDS", 64)
    net = sequence(depth=1)
    for k in range(1, 200):
        train(net, image(1, 8, 1, k))
    keeper = net._keeper
    assert len(keeper._menus) == len(keeper._orders) == 64 >= len(keeper._numbers)
    assert kept_in(net, lambda: train(net, image(1, 8, 1, 199))) == 1
    assert kept_in(net, lambda: train(net, image(1, 8, 1, 1))) == 0


def test_without_gradients_nothing_is_measured():
    net, x = sequence(), image()
    with torch.no_grad():
        assert [kept_in(net, lambda: net(x)) for _ in range(2)] == [4, 4]
    assert kept_in(net, lambda: train(net, x)) == 0


def test_a_plan_saves_the_step_that_measures():
    net, x = sequence(), image()
    assert net.plan(x).kept == 4
    assert kept_in(net, lambda: train(net, x)) == 4


@pytest.mark.parametrize("training", [True, False])
def test_a_plan_leaves_everything_as_it_was(training):
    net, x = sequence(), image().requires_grad_()
    convolution = torch.nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 1))
    net.append(revflow.AdditiveCoupling(nn.Sequential(nn.BatchNorm2d(4), convolution, nn.Dropout(0.5))))
    net.double().train(training)
    pending = net(x)
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    net.plan(x)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    assert x.grad is None and all(p.grad is None for p in net.parameters())
    assert net.training is training
    pending.sum().backward()  # nothing that its graph needs was changed


def test_a_conditioner_that_differentiates_is_measured():
    class Gradient(nn.Module):
        def __init__(self):
            super().__init__()
            self.energy = nn.Linear(3, 5)

        def forward(self, x):
            with torch.enable_grad():
                x = x if x.requires_grad else x.detach().requires_grad_()
                return torch.autograd.grad(torch.tanh(self.energy(x)).square().sum(), x, create_graph=True)[0]

    torch.manual_seed(0)
    net = revflow.ReversibleSequence(
        [revflow.AdditiveCoupling(Gradient()) for _ in range(3)], memory_budget=HUGE
    ).double()
    x = image(4, 6).requires_grad_()
    for _ in range(2):
        assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [x])


# What is held


def test_the_budget_is_for_all_calls_that_wait_for_their_backward_pass():
    net, x = sequence(), image()
    net.memory_budget = halfway(net, x)
    train(net, x)
    alone = kept_in(net, lambda: train(net, x))
    assert 0 < alone < 4
    first = net(x)
    second = evaluations(net, lambda: net(x))  # its graph is dropped at once
    kept = sum(s.sum() for s in (first,))
    after = kept_in(net, lambda: train(net, x))
    assert second == [[1]] * 4 and after < alone
    kept.backward()
    assert kept_in(net, lambda: train(net, x)) < alone  # there is room for a second call, now that there was one
    both = evaluations(net, lambda: sum(y.sum() for y in [net(x), net(x)]).backward())
    assert min(both) < [4]
    assert net._keeper.in_use == 0


@pytest.mark.parametrize("end", ["backward", "retained", "dropped", "failed"])
def test_what_is_held_is_given_back(end):
    net, x = sequence(), image()
    net.plan(x)
    y = net(x)
    held = net._keeper.in_use
    assert held > 0
    gc.disable()
    try:
        if end == "backward":
            loss = y.sum()
            loss.backward()  # the graph's nodes live on, what they saved does not
        elif end == "retained":
            y.sum().backward(retain_graph=True)
            assert net._keeper.in_use == held
            y.sum().backward()
        elif end == "dropped":
            del y
        else:
            y.register_hook(lambda gradient: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                y.sum().backward()
            del y
    finally:
        gc.enable()
    assert net._keeper.in_use == 0


def test_copies_hold_nothing():
    net, x = sequence(), image()
    net.plan(x)
    y = net(x)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(file, weights_only=False)):
        assert twin._keeper.in_use == 0 < net._keeper.in_use
        assert twin.memory_budget == HUGE
        train(twin, x)
        assert kept_in(twin, lambda twin=twin: train(twin, x)) == 4
    y.sum().backward()


def test_accumulated_gradients():
    net, xs = sequence(), [image(seed=k) for k in range(4)]
    net.memory_budget = halfway(net, xs[0])
    plain = copy.deepcopy(net)
    plain.memory_budget = "max"
    for n in (net, plain):
        for x in xs:
            train(n, x)
        sum(n(x).sum() for x in xs).backward()
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)


# What is told


def test_one_warning_where_even_rebuilding_takes_more():
    net, x = sequence(budget=100), image()
    train(net, x)
    with pytest.warns(UserWarning, match=r"memory_budget=100 is too small: .* chunks=n") as found:
        train(net, x)
    assert {warning.filename for warning in found} == {__file__}  # the user's line, not the engine's
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(net, x)


def test_what_is_kept_is_logged_once_for_each_kind_of_input(caplog):
    net, x = sequence(), image()
    net.memory_budget = budget = halfway(net, x)
    with caplog.at_level("INFO", "revflow"):
        for _ in range(2):
            net(x).sum().backward()
    (record,) = caplog.records
    plan = net.plan(x)
    assert 0 < plan.kept < len(net)
    assert (record.name, record.levelname) == ("revflow.budget", "INFO")
    outputs = len(plan.outputs_kept)
    assert outputs > 0
    stored = f"{plan.kept} of {len(net)} blocks stored, outputs of {outputs} more, expected peak {size(plan.peak)}"
    assert record.getMessage() == f"memory_budget={budget}: {stored}"


def test_a_printed_plan():
    net, x = sequence(), image()
    net.memory_budget = budget = halfway(net, x)
    plan = net.plan(x)
    lines = str(plan).splitlines()
    assert [line.split()[:3] for line in lines[1:-1]] == [
        [
            str(k),
            "AdditiveCoupling",
            "stored" if k >= plan.first_kept else "output" if k in plan.outputs_kept else "recomputed",
        ]
        for k in range(4)
    ]
    assert 0 < len(plan.outputs_kept) < plan.first_kept < 4
    assert f"{plan.kept} of 4 blocks and {len(plan.outputs_kept)} outputs stored" in lines[-1]
    for figure in (budget, plan.peak, plan.transient):
        assert size(figure) in lines[-1]
    again = [1 - plan.costs[k].spared / plan.costs[k].work * (k in plan.outputs_kept) for k in range(plan.first_kept)]
    again = sum(part * seconds for part, seconds in zip(again, plan.seconds, strict=False))
    assert plan.time_ratio == pytest.approx(1 + again / (3 * sum(plan.seconds)))
    assert 1 < plan.time_ratio < 4 / 3
    for budget, ratio in (("min", 4 / 3), ("max", 1)):
        net.memory_budget = budget
        assert net.plan(x).time_ratio == pytest.approx(ratio)
        assert "without a budget" in str(net.plan(x))


def test_a_planned_time_is_the_median_of_three_runs(monkeypatch):
    runs = iter([[9, 9, 9, 9], [1, 2, 3, 40], [1, 20, 3, 4], [10, 2, 3, 4]])  # the first one warms up
    monkeypatch.setattr(ChainCall, "seconds", lambda chain: next(runs))
    assert sequence().plan(image()).seconds == (1, 2, 3, 4)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**30, "1.0 GiB"), (2**43, "8192.0 GiB")]
)
def test_sizes(count, text):
    assert size(count) == text


@pytest.mark.parametrize(
    ("x", "message"), [([1], "a tuple of streams; got a list"), (torch.ones(2, 7), "an odd number")]
)
def test_a_plan_of_what_is_no_input(x, message):
    with pytest.raises((TypeError, ValueError), match=message):
        sequence().plan(x)


# Sequences in other things


def test_options_go_with_slices_sums_and_copies():
    net = sequence("2MiB", chunks=2)
    for part in (net[1:], net + net, copy.deepcopy(net)):
        assert (part.memory_budget, part.chunks) == ("2MiB", 2)
    assert "memory_budget='2MiB', chunks=2" in repr(net)
    assert "memory_budget" not in repr(sequence("min"))


def test_a_sequence_among_the_blocks():
    x = image()
    net = revflow.ReversibleSequence([sequence("min"), *sequence("min")], memory_budget=HUGE).double()
    train(net, x)
    assert [n for block in evaluations(net, lambda: train(net, x)) for n in block] == [1] * 8
    with pytest.raises(RuntimeError, match="block 0 is a ReversibleSequence with memory_budget=10 inside one with"):
        revflow.ReversibleSequence([sequence(10)], memory_budget=HUGE)(x)
    with pytest.raises(RuntimeError, match="chunks=2"):
        revflow.ReversibleSequence([sequence("min", chunks=2)])(x)


@pytest.mark.parametrize("inner", ["min", HUGE, "max"])
@pytest.mark.parametrize("outer", ["min", HUGE, "max"])
def test_a_sequence_in_a_conditioner(inner, outer):
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.chain = revflow.ReversibleSequence([additive(2) for _ in range(3)], memory_budget=inner)

        def forward(self, x):
            return self.chain(x)

    torch.manual_seed(0)
    net = revflow.ReversibleSequence([revflow.AdditiveCoupling(Deep()) for _ in range(3)], memory_budget=outer).double()
    x = image().requires_grad_()
    for _ in range(3):
        assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [x])


def test_compiled_conditioners_with_dropout():
    torch.manual_seed(0)
    blocks = [revflow.AdditiveCoupling(Conditioner(4, dropout=0.5)) for _ in range(3)]
    net, x = revflow.ReversibleSequence(blocks, memory_budget=HUGE), image(dtype=torch.float32).requires_grad_()
    net.compile_conditioners(backend="aot_eager")
    for _ in range(3):
        assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [x], tolerance=1e-5)
    assert len(conditioners(net)) == 3
