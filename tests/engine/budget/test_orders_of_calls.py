"""revflow.Budget over steps that make other calls, or make them in another order."""

import warnings
from functools import partial

import pytest
import torch
from torch import nn

import revflow
from engine.budgets import HUGE, limited, range_of, transient_of
from engine.nets import additive, assert_close, edge_to, weighted
from engine.shared_budgets import Net, gradients, half, planned_range, streams, twice


def once(net, x):
    return net.decoder(net.encoder(x))


def four_times(net, x):
    y = net.encoder(x)
    for _ in range(4):
        y = net.decoder(y)
    return y


def backwards(net, x):
    return net.encoder.inverse(net.decoder.inverse(x))


def through_time(net, x):
    return net.through(x)


PROGRAMS = {
    "more": [once, twice, twice, once, four_times, four_times],
    "fewer": [four_times, four_times, once, once, twice],
    "in turns": [once, backwards, once, backwards, through_time, once, through_time, backwards],
    "nested": [twice, once, four_times, through_time, once, twice, four_times, through_time],
}


@pytest.mark.parametrize("share", [0.2, 0.7])
@pytest.mark.parametrize("programs", PROGRAMS.values(), ids=PROGRAMS)
@pytest.mark.filterwarnings("ignore:memory_budget")
def test_other_orders(programs, share):
    """The gradients are right in every step, and an order that was met before stays within the budget."""
    ranges = [_range_of(program) for program in set(programs)]
    least, most = max(low for low, _ in ranges), max(high for _, high in ranges)
    budget = revflow.Budget(int(least + share * (most - least)))
    net, x, seen = Net(budget), streams(), set()
    for program in [*programs, *programs]:
        with revflow.ordinary_autograd():
            expected = gradients(net, x, lambda x, p=program: torch.cat(p(net, x), 1))
        found = []
        run = partial(gradients, net, x, lambda x, p=program: torch.cat(p(net, x), 1))
        report = revflow.measure_memory(lambda found=found, run=run: found.extend(run()))
        assert_close(found, expected)
        assert net.encoder._keeper.in_use == 0
        if program in seen:
            assert report.peak <= budget.memory + transient_of(budget) + _of_the_loss(found), program.__name__
        seen.add(program)


def _range_of(program):
    def training(budget):
        net = Net(budget)
        return lambda: weighted(torch.cat(program(net, streams()), 1)).backward()

    return range_of(training)


def _of_the_loss(gradients):
    """What a step has besides: the gradients that it returns, the joined output, and the loss's own values."""
    return sum(g.nbytes for g in gradients if g is not None) + 5 * sum(s.nbytes for s in streams())


def test_what_a_common_beginning_stores_leaves_room_for_all_known_orders():
    """A step of many small calls stores its first call, which a step with one large call must not."""
    torch.manual_seed(0)
    small = [additive(3) for _ in range(3)]
    wide = [revflow.AdditiveCoupling(nn.Sequential(nn.Conv2d(3, 100, 1), nn.SiLU(), nn.Conv2d(100, 3, 1)))]
    budget = revflow.Budget(HUGE)
    first, second, large = (
        revflow.ReversibleSequence(blocks, memory_budget=budget, guard="off").double()
        for blocks in (small, small[::-1], wide)
    )
    x = streams()

    def step(parts):
        y = x
        for part in parts:
            y = part(y)
        edges, seeds = [edge_to(s) for s in y], [torch.ones_like(s) for s in y]
        del y
        torch.autograd.backward(edges, seeds)

    orders = [[first, second, second, second], [first, large]]
    for parts in orders:
        step(parts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # there is enough for both
        menus = [m.menu for m in budget._keeper._menus.values()]
        limit = menus[0].least.held + menus[2].least.peak + 1000
        limited(budget, limit)
        assert menus[0].by_held[-1].held > menus[0].least.held + 1000
        for parts in [*orders, *orders]:
            peak = revflow.measure_memory(lambda p=parts: step(p)).peak
            params = max(sum(p.nbytes for p in part.parameters()) for part in parts)
            assert peak <= limit + params + 4 * sum(s.nbytes for s in x)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6])
@pytest.mark.filterwarnings("ignore:memory_budget")
def test_an_output_that_stays_from_step_to_step(share):
    """`y` of the step before is alive while the next one runs."""
    least, most = planned_range()
    budget = revflow.Budget(int(2 * (least + share * (most - least))))
    net, x = Net(budget), streams()
    expected = None

    def loop(steps):
        nonlocal expected
        for _ in range(steps):
            y = net(x)
            found = torch.autograd.grad(weighted(y), [*x, *net.parameters()])
            if expected is None:
                expected = found
            assert_close(found, expected)

    loop(3)
    assert net.encoder._keeper.in_use == 0
    assert len(budget.plan.calls) == 5


def test_accumulated_gradients():
    least, most = planned_range()
    nets = [Net(revflow.Budget(half(least, most))), Net("max")]
    for net in nets:
        for k in range(3):
            net(streams(k)).square().sum().backward()
        sum(net(streams(k)).square().sum() for k in range(3)).backward()
    assert_close(*([p.grad for p in net.parameters()] for net in nets))
