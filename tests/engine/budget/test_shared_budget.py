"""revflow.Budget: one memory budget for several sequences and recurrences, over a whole training step."""

import copy
import io
import json
import pickle
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import revflow
from engine.budgets import HUGE, limited, range_of, transient_of
from engine.cells import Cell
from engine.nets import additive, assert_close, conditioners, edge_to, gated, image, weighted
from revflow._base.memory_size import size


class Net(nn.Module):
    """An encoder, a decoder, and a recurrence between them."""

    def __init__(self, budget, depth=3):
        super().__init__()
        torch.manual_seed(0)
        options = {"memory_budget": budget, "guard": "off"}
        self.encoder = revflow.ReversibleSequence([additive(3) for _ in range(depth)], **options)
        self.decoder = revflow.ReversibleSequence([gated(3) for _ in range(depth)], **options)
        self.stack = revflow.ReversibleRecurrence([Cell(False, 0.0) for _ in range(2)], **options)
        self.double()

    def through(self, x):
        """A sequence as encoder, three time steps, a sequence as decoder."""
        streams = self.encoder(x)
        zeros = torch.zeros_like(streams[0])
        state = revflow.RecurrentState(((zeros, zeros),) * 2, ((), ()))
        for _ in range(3):
            streams, state = self.stack.step(streams, state)
        return self.decoder(streams)

    def forward(self, x):
        return torch.cat(self.through(x), 1)


def streams(seed=1):
    return image(2, 3, 6, 4, seed=seed).requires_grad_(), image(2, 3, 6, 4, seed=seed + 1).requires_grad_()


def training(net, x):
    """A step whose loss takes nothing itself."""
    leaves, seeds = [*x, *net.parameters()], [torch.randn_like(s) for s in x]
    for leaf in leaves:
        leaf.grad = torch.zeros_like(leaf)

    def step():
        outputs = net.through(x)
        edges = [edge_to(s) for s in outputs]
        del outputs
        torch.autograd.backward(edges, seeds)

    return step


def gradients(net, x, run=None):
    return torch.autograd.grad(weighted((run or net)(x)), [*x, *net.parameters()], allow_unused=True)


def stored(plan):
    return [(call.stored, call.outputs_stored) for call in plan.calls]


def half(least, most):
    return (least + most) // 2


def planned_range():
    return range_of(lambda budget: training(Net(budget), streams()))


def counted(net, run):
    """The evaluations of all conditioners and cells."""
    for conditioner in conditioners(net):
        conditioner.calls = 0
    for cell in net.stack:
        cell.calls = [0, 0]
    run()
    return [*(c.calls for c in conditioners(net)), *(tuple(cell.calls) for cell in net.stack)]


# Over one step


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
def test_it_holds_for_all_calls_together(share):
    least, most = planned_range()
    budget = revflow.Budget(int(least + share * (most - least)))
    net, x = Net(budget), streams()
    step = training(net, x)
    own = max(sum(p.nbytes for p in block.parameters()) for part in net.children() for block in part)
    for _ in range(2):
        found = revflow.measure_memory(step).peak
        assert found <= budget.memory + transient_of(budget) + own
    assert budget.plan.peak <= budget.memory
    units = [(call.unit, call.units) for call in budget.plan.calls]
    assert units == [("block", 3), *[("cell", 2)] * 3, ("block", 3)]
    everything = sum(call.stored for call in budget.plan.calls)
    assert {0.0: everything < 9, 1.0: everything == 12}.get(share, 0 < everything < 12)
    assert net.encoder._keeper.in_use == 0


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0])
def test_gradients(share):
    least, most = planned_range()
    net, x = Net(revflow.Budget(int(least + share * (most - least)))), streams()
    with revflow.ordinary_autograd():
        expected = gradients(net, x)
    for _ in range(3):
        assert_close(gradients(net, x), expected)


def test_a_budget_below_the_need_behaves_as_min():
    x, measured = streams(), []
    for budget in (revflow.Budget(100), "min"):
        net = Net(budget)
        step = training(net, x)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            for _ in range(3):
                step()
            for _ in range(2):  # another order of calls is too large as well
                torch.cat(twice(net, x), 1).sum().backward()
        messages = [str(w.message) for w in found if "too small" in str(w.message)]
        assert len(messages) == (budget != "min")
        assert all("(Shown once per budget.)" in message for message in messages)
        measured.append((revflow.measure_memory(step).peak, counted(net, step)))
    assert measured[0][1] == measured[1][1]
    assert measured[0][0] == measured[1][0]


@pytest.mark.parametrize(("extreme", "times"), [("min", 2), ("max", 1)])
def test_the_extremes(extreme, times):
    budget = revflow.Budget(extreme)
    net, x = Net(budget), streams()
    for _ in range(2):
        found = counted(net, lambda: net(x).sum().backward())
        assert found[:6] == [times] * 6
        assert [update for update, _ in found[6:]] == [3 * times] * 2
    assert budget.plan is None
    assert repr(budget) == f"Budget({extreme!r})"


@pytest.mark.parametrize("given", [-1, "much", 1.5, None, True])
def test_it_takes_what_a_memory_budget_may_be(given):
    with pytest.raises((ValueError, TypeError), match="memory_budget"):
        revflow.Budget(given)
    with pytest.raises(TypeError, match="memory_budget"):
        revflow.Budget(revflow.Budget("min"))


def test_slices_share_it():
    budget = revflow.Budget("1GiB")
    net = Net(budget)
    parts = [net.encoder[1:], net.encoder + net.decoder, net.stack[:1]]
    assert all(part.memory_budget is budget and part._keeper is budget._keeper for part in parts)


# Other orders of calls


def once(net, x):
    return net.decoder(net.encoder(x))


def twice(net, x):
    return net.decoder(net.decoder(net.encoder(net.encoder(x))))


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


# Hooks, errors and copies


@pytest.mark.parametrize("way", ["checkpoint", "reentrant", "save_on_cpu"])
def test_checkpoints(way):
    """Calls inside of them recompute, and the others follow the plan of their own order."""
    budget = revflow.Budget(planned_range()[1])
    net, x = Net(budget), streams()

    def run(x):
        if way == "save_on_cpu":
            with torch.autograd.graph.save_on_cpu():
                y = net.encoder(x)
        else:
            y = checkpoint(lambda *x: net.encoder(x), *x, use_reentrant=way == "reentrant")
        return torch.cat(net.decoder(net.stack([y] * 3, _state(y))[0][-1]), 1)

    def reference(x):
        y = net.encoder(x)
        return torch.cat(net.decoder(net.stack([y] * 3, _state(y))[0][-1]), 1)

    def found(run):
        for leaf in (*x, *net.parameters()):
            leaf.grad = None
        weighted(run(x)).backward()
        return [leaf.grad for leaf in (*x, *net.parameters())]

    with revflow.ordinary_autograd():
        expected = found(reference)
    for _ in range(3):
        assert_close(found(run), expected)
        assert net.encoder._keeper.in_use == 0
    assert [call.unit for call in budget.plan.calls] == ["cell"] * 3 + ["block"]
    assert counted(net, lambda: found(run))[3:6] == [1] * 3


def _state(streams):
    zeros = torch.zeros_like(streams[0])
    return revflow.RecurrentState(((zeros, zeros),) * 2, ((), ()))


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("where", ["encoder", "stack", "decoder", "between"])
def test_an_error_in_a_forward_pass_leaves_nothing_pending(where, learned):
    least, most = planned_range()
    budget = revflow.Budget(half(least, most))
    net, x = Net(budget), streams()
    with revflow.ordinary_autograd():
        expected = gradients(net, x)
    if learned:
        gradients(net, x)

    def fail(*_):
        raise ZeroDivisionError

    module = {"encoder": net.encoder[1].F, "stack": net.stack[1].gates, "decoder": net.decoder[2].F}.get(where)
    if module is None:
        y = net.encoder(x)
        assert budget._keeper.in_use > 0
        del y
    else:
        handle = module.register_forward_hook(fail)
        with pytest.raises(ZeroDivisionError):
            net(x)
        handle.remove()
    assert budget._keeper.in_use == len(budget._keeper._pending) == 0
    for _ in range(3):
        assert_close(gradients(net, x), expected)
    assert budget.plan.peak <= budget.memory


def _saved_and_loaded(net):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net)), _saved_and_loaded])
def test_copies_share_one_budget_of_their_own(make):
    least, most = planned_range()
    budget = revflow.Budget(half(least, most))
    net, x = Net(budget), streams()
    for _ in range(2):
        expected = gradients(net, x)
    pending = net(x)
    twin = make(net)
    keepers = {part._keeper for part in twin.children()}
    assert len(keepers) == 1 and budget._keeper not in keepers
    assert {id(part.memory_budget) for part in twin.children()} == {id(twin.encoder.memory_budget)} != {id(budget)}
    own = twin.encoder.memory_budget
    assert own.memory == budget.memory and own._keeper in keepers
    assert own._keeper.in_use == 0 < budget._keeper.in_use
    del pending
    for _ in range(2):
        assert_close(gradients(twin, x), expected)
    assert own.plan == budget.plan


# State and printing


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_a_new_process_continues_with_the_plan(share):
    """Its first step is, bit for bit, as the planned steps before."""
    least, most = planned_range()
    limit = int(least + share * (most - least))
    budget = revflow.Budget(limit)
    net, x = Net(budget), streams()
    for _ in range(3):
        expected = gradients(net, x)
    evaluations = counted(net, lambda: gradients(net, x))
    state = json.loads(json.dumps(budget.state_dict()))
    other = revflow.Budget(limit)
    again = Net(other)
    other.load_state_dict(state)
    found = []
    assert counted(again, lambda: found.extend(gradients(again, x))) == evaluations
    assert all(map(torch.equal, found, expected))
    assert other.plan == budget.plan
    assert other.state_dict()["orders"] and stored(other.plan) == stored(budget.plan)


def test_a_share_is_restored_and_bytes_stay(monkeypatch):
    monkeypatch.setattr("revflow._budget.keeper.free_memory", lambda device: 10**6)
    budget, x = revflow.Budget(0.5), streams()
    net = Net(budget)
    for _ in range(2):
        gradients(net, x)
    assert budget.plan.budget == 500_000
    monkeypatch.setattr("revflow._budget.keeper.free_memory", lambda device: 10**8)
    state = json.loads(json.dumps(budget.state_dict()))
    for given, limit in ((0.5, 500_000), (0.9, 500_000), (300_000, 300_000), ("1MB", 10**6)):
        other = revflow.Budget(given)
        other.load_state_dict(state)
        gradients(Net(other), x)
        assert other.plan.budget == limit


def test_a_state_of_another_network_is_learned_again():
    most, x = planned_range()[1], streams()
    budget = revflow.Budget(most)
    gradients(Net(budget), x)
    other = revflow.Budget(most)
    net = Net(other, depth=4)
    other.load_state_dict(budget.state_dict())
    with revflow.ordinary_autograd():
        expected = gradients(net, x)
    for _ in range(3):
        assert_close(gradients(net, x), expected)


def test_a_printed_plan():
    least, most = planned_range()
    budget = revflow.Budget(half(least, most))
    assert budget.plan is None
    net, x = Net(budget), streams()
    for _ in range(2):
        gradients(net, x)
    plan = budget.plan
    heading, *calls, last = str(plan).splitlines()
    assert repr(plan) == str(plan)
    assert heading.split() == ["call", "stored", "outputs", "stored", "recomputed", "memory", "time"]
    names = ["forward, 3 blocks", *["time step, 2 cells"] * 3, "forward, 3 blocks"]
    for line, name, call in zip(calls, names, plan.calls, strict=True):
        recomputed = call.units - call.stored - call.outputs_stored
        assert line.startswith(name.ljust(18))
        counts = [str(n) for n in (call.stored, call.outputs_stored, recomputed)]
        assert line[18:].split() == [*counts, *size(call.held).split(), f"{call.share:.1%}"]
    assert len({len(line) for line in (heading, *calls)}) == 1  # columns of numbers end in line
    assert max(map(len, (heading, *calls))) <= 80
    assert sum(call.share for call in plan.calls) == pytest.approx(1)
    total, outputs = sum(call.stored for call in plan.calls), sum(call.outputs_stored for call in plan.calls)
    more = f", and the outputs of {outputs} more," if outputs else ""
    assert last.startswith(f"{total} of 12 blocks and cells{more} stored with a budget of {size(budget.memory)}: ")
    assert f"peak {size(plan.peak)}, expected time {plan.time_ratio:.2f}× standard autograd" in last
    assert 1 < plan.time_ratio < 4 / 3
