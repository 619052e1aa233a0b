"""revflow.Budget: one memory budget for several sequences and recurrences, over a whole training step."""

import copy
import io
import json
import pickle
import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import revflow
from engine.budgets import transient_of
from engine.nets import assert_close, weighted
from engine.shared_budgets import Net, counted, gradients, half, planned_range, stored, streams, training, twice
from revflow._base.memory_size import size

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
