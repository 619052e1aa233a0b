"""memory_budget of a recurrence: some time steps are stored, the others recomputed."""

import itertools

import pytest
import torch

import revflow
from crevnet import ReversiblePredictiveModule
from engine.budgets import HUGE, limited, transient_of
from engine.cells import CELLS, Cell, Wide, along, assert_same, both, given, loss_of, recurrence, values
from engine.nets import assert_close, edge_to
from revflow._budget.keeper import Keeper

STEPS = 5
ways = pytest.mark.parametrize("states", ["kept", "bfloat16", "offloaded", 1, 3])
few_ways = pytest.mark.parametrize("states", ["kept", "bfloat16", 3])
fed_back = pytest.mark.parametrize("is_fed_back", [False, True], ids=["taught", "fed back"])
SETS = [*({*range(k, STEPS)} for k in range(STEPS + 1)), {0}, {0, 2, 4}, {1, 2}, {0, 1, 3}]
stored_sets = pytest.mark.parametrize("stored", [{3, 4}, {0, 2}, {*range(STEPS)}], ids=str)


@pytest.fixture
def store(monkeypatch):
    """store(numbers) makes every recurrence with a budget store the time steps of these numbers, once it has measured."""

    def store(numbers):
        def option(self, order, device):
            menu = self._menus[order[-1]].menu
            return menu.most if len(order) - 1 in numbers else menu.least

        monkeypatch.setattr(Keeper, "_option", option)

    return store


def budgeted(memory=True, **options):
    return recurrence(memory, **{"memory_budget": HUGE, **options})


def inputs_of(is_fed_back, memory=True, steps=STEPS, **options):
    inputs, state = given(memory, steps, **options)
    return (inputs[:1] + [None] * (steps - 1) if is_fed_back else inputs), state


# How often, and how much


class Counted(ReversiblePredictiveModule):
    """A module of CrevNet that counts its updates and mixes."""

    def __init__(self, kind):
        super().__init__(4, kind)
        self.calls = [0, 0]

    def update(self, *arguments):
        self.calls[0] += 1
        return super().update(*arguments)

    def mix(self, *arguments):
        self.calls[1] += 1
        return super().mix(*arguments)


class Steps:
    """A training step through time steps of CrevNet's modules; its loss takes nothing itself."""

    def __init__(self, kind, is_fed_back, steps=STEPS, **options):
        torch.manual_seed(0)
        self.net = revflow.ReversibleRecurrence([Counted(kind) for _ in range(2)], guard="off", **options)
        self.is_fed_back, self.steps = is_fed_back, steps
        self.inputs = [tuple(values(2 * t + k, torch.float32, (2, 4, 6, 6)) for k in range(2)) for t in range(steps)]
        h, c, m = (values(50 + k, torch.float32, (2, 4, 6, 6)) for k in range(3))
        self.state = revflow.RecurrentState(((h, c),) * 2, ((m,) if kind == "st-lstm" else (),) * 2)
        self.leaves = [*itertools.chain(*self.inputs), h, c, m, *self.net.parameters()]
        for leaf in self.leaves:
            leaf.grad = torch.zeros_like(leaf)
        self.seeds = [torch.ones_like(h)] * 2

    def __call__(self):
        state, output = self.state, self.inputs[0]
        for t in range(self.steps):
            output, state = self.net.step(output if self.is_fed_back else self.inputs[t], state)
        edges = [edge_to(s) for s in output]
        del output, state
        torch.autograd.backward(edges, self.seeds)

    def counts(self):
        for cell in self.net:
            cell.calls = [0, 0]
        self()
        return [cell.calls for cell in self.net]

    def gradients(self):
        for leaf in self.leaves:
            leaf.grad = None
        self()
        return [leaf.grad for leaf in self.leaves]


cells = pytest.mark.parametrize("kind", ["st-lstm", "convlstm"])


@cells
@ways
@fed_back
def test_at_max_each_update_runs_once(kind, states, is_fed_back):
    step = Steps(kind, is_fed_back, states=states, memory_budget="max")
    assert step.counts() == [[STEPS, STEPS]] * 2
    found = step.gradients()
    with revflow.ordinary_autograd():
        expected = step.gradients()
    for f, e in zip(found, expected, strict=True):
        assert f is e is None or torch.equal(f, e)


def expected_counts(steps, stored, n):
    """Of updates, if the last steps are stored."""
    recomputed = steps - stored
    return 2 * recomputed + (recomputed - recomputed // n) + stored


@cells
@ways
@fed_back
def test_counts_and_peaks_for_every_number_of_stored_steps(kind, states, is_fed_back):
    n = states if isinstance(states, int) else 1
    budget = revflow.Budget(HUGE)
    step = Steps(kind, is_fed_back, states=states, memory_budget=budget)
    assert step.counts() == Steps(kind, is_fed_back, states=states).counts()  # the one that measures is as "min"
    own = sum(p.nbytes for p in step.net.parameters())
    limited(budget, 0)
    least, counts = budget.plan.peak, set()
    limited(budget, HUGE)
    most = budget.plan.peak
    for share in torch.linspace(0, 1, 16).tolist():
        limit = int(share * most)
        limited(budget, limit)
        plan = budget.plan
        stored = [call.stored for call in plan.calls]
        count = stored.count(2)
        assert stored == [0] * (STEPS - count) + [2] * count  # the last ones
        assert plan.peak <= max(limit, least)
        if count not in counts:
            found = []
            peak = revflow.measure_memory(lambda found=found: found.extend(step.counts())).peak
            assert [updates for updates, _ in found] == [expected_counts(STEPS, count, n)] * 2
            assert abs(peak - plan.peak) <= transient_of(budget) + 2 * own
        counts.add(count)

    assert counts == {*range(STEPS + 1)}


@cells
def test_a_budget_below_the_need_behaves_as_min(kind):
    few = [Steps(kind, False, memory_budget=budget) for budget in (100, "min")]
    with pytest.warns(UserWarning, match="memory_budget=100 is too small"):
        [(step(), step()) for step in few]
    counts = [step.counts() for step in few]
    assert counts[0] == counts[1]
    peaks = [revflow.measure_memory(step).peak for step in few]
    assert peaks[0] == peaks[1]


# Gradients


@ways
@fed_back
@pytest.mark.parametrize("memory", [False, True], ids=["", "memory"])
def test_gradients_at_every_number_of_stored_steps(states, is_fed_back, memory, store):
    net, (inputs, state) = budgeted(memory, states=states), inputs_of(is_fed_back, memory)
    for stored in SETS:
        store(stored)
        assert_close(*both(net, inputs, state))


@few_ways
@stored_sets
def test_states_that_are_changed_between_steps(states, stored, store):
    net, (inputs, state) = budgeted(states=states), given(steps=STEPS)
    store(stored)
    mask = torch.linspace(0, 1, state.cells[0][0].numel(), dtype=torch.float64).view_as(state.cells[0][0])

    def program(step):
        now, outputs = state, []
        for t, streams in enumerate(inputs):
            output, now = step(streams, now)
            if t % 2 == 0:
                h, c = now.cells[1]
                now = now._replace(cells=(now.cells[0], (h * mask, c), *now.cells[2:]))
            if t == 2:  # dropped on the way
                now = now._replace(memories=(*now.memories[:-1], tuple(m.detach() for m in now.memories[-1])))
            outputs.append(output)
        return loss_of((outputs, now))

    for _ in range(2):
        assert_same(net, program)


@few_ways
@stored_sets
@pytest.mark.parametrize("frozen", [[0], [2], [0, 1, 2]], ids=str)
def test_frozen_cells(states, stored, frozen, store):
    net, (inputs, state) = budgeted(states=states), given(steps=STEPS)
    store(stored)
    for k in frozen:
        net[k].requires_grad_(False)
    for _ in range(2):
        assert_close(*both(net, inputs, state))


@few_ways
@stored_sets
def test_context_with_gradients_and_a_loss_in_the_middle(states, stored, store):
    net, (inputs, state) = budgeted(states=states), given(steps=STEPS)
    store(stored)
    factor = values(7, shape=(1, 3, 1, 1))
    for _ in range(2):
        assert_close(*both(net, inputs, state, factor=factor))
        assert_same(net, lambda step: along(step, inputs, state)[0][2][0].square().sum())


@few_ways
@stored_sets
def test_dropout_and_the_random_state(states, stored, store):
    net, (inputs, state) = budgeted(dropout=0.5, states=states), given(steps=STEPS)
    store(stored)
    for _ in range(2):
        assert_close(*both(net, inputs, state))
    torch.manual_seed(3)
    net(inputs, state)
    after = torch.rand(1)
    torch.manual_seed(3)
    along(net.plain_step, inputs, state)
    assert torch.equal(torch.rand(1), after)


@few_ways
@stored_sets
def test_autocast(states, stored, store):
    net, (inputs, state) = budgeted(dtype=torch.float32, states=states), given(steps=STEPS, dtype=torch.float32)
    store(stored)
    # With the cache, standard autograd adds up a weight's gradients in bfloat16.
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        for _ in range(2):
            assert_close(*both(net, inputs, state), tolerance=1e-5)


@few_ways
@stored_sets
def test_a_second_backward_pass_and_partial_ones(states, stored, store):
    net, (inputs, state) = budgeted(states=states), given(steps=STEPS)
    store(stored)
    wanted = [*net.parameters(), *inputs[0], *state.cells[1]]
    for _ in range(2):
        loss = loss_of(net(inputs, state))
        expected = torch.autograd.grad(loss_of(along(net.plain_step, inputs, state)), wanted)
        for _ in range(2):
            assert_close(torch.autograd.grad(loss, wanted, retain_graph=True), expected)
        few = list(net[1].parameters())
        found = torch.autograd.grad(loss, few, retain_graph=True)
        assert_close(found, [e for p, e in zip(wanted, expected, strict=True) if any(p is q for q in few)])
        torch.autograd.grad(loss, inputs[-1], retain_graph=True)
        assert net._keeper.in_use > 0
        loss.backward(inputs=wanted)
        assert net._keeper.in_use == 0


# Parameters


@few_ways
@stored_sets
def test_hooks_of_parameters_run_once(states, stored, store):
    """As DDP needs it: each gets the whole gradient."""
    net, (inputs, state), calls = budgeted(states=states), given(steps=STEPS), []
    store(stored)
    parameters = list(net.parameters())
    for k, p in enumerate(parameters):
        p.register_hook(lambda g, k=k: calls.append(("gradient", k)))
        p.register_post_accumulate_grad_hook(lambda p, k=k: calls.append(("accumulated", k)))
    for _ in range(2):
        calls.clear()
        net.zero_grad()
        loss_of(net(inputs, state)).backward()
        assert sorted(calls) == sorted(
            (name, k) for name in ("gradient", "accumulated") for k in range(len(parameters))
        )


@pytest.mark.parametrize("stored", [{4}, {3, 4}, {0}, {0, 2}, {1, 2, 4}, {*range(5)}], ids=str)
def test_there_is_no_second_set_of_gradients(stored, store):
    """The gradients of stored and of recomputed steps are summed in one set, beside a cell's own."""
    x = torch.ones(1, 64)

    def peak(budget):
        torch.manual_seed(0)
        net = revflow.ReversibleRecurrence([Wide() for _ in range(4)], guard="off", memory_budget=budget)
        weights = sum(p.nbytes for p in net.parameters())
        store(stored)
        for _ in range(2):
            outputs, _ = net([(x,)] * 5, revflow.RecurrentState(((x,),) * 4, ((),) * 4))
            loss = outputs[-1][0].sum()
            found = revflow.measure_memory(lambda loss=loss: [torch.autograd.grad(loss, list(net.parameters()))]).peak
        return found, weights

    (mixed, weights), (least, _) = peak(HUGE), peak("min")
    assert mixed - least < weights / 4 + 5 * x.nbytes * 50


# Life


def test_stored_steps_hold_memory_until_their_graph_is_freed():
    net, (inputs, state) = budgeted(), given(steps=3)
    for _ in range(2):
        results = net(inputs, state)
        assert len(net._keeper._pending) == 3 and net._keeper.in_use > 0
        del results
        assert net._keeper.in_use == len(net._keeper._pending) == 0


@pytest.mark.parametrize("stored", [set(), {0, 1, 2}, {2}], ids=str)
@pytest.mark.parametrize("states", ["kept", "offloaded", 3])
@pytest.mark.parametrize("memory", [False, True], ids=["", "memory"])
def test_what_a_step_holds_is_what_it_is_said_to_hold(states, stored, memory, store):
    net, (inputs, state) = (
        budgeted(memory, dtype=torch.float32, guard="off", states=states),
        given(memory, steps=3, dtype=torch.float32),
    )
    store(stored)
    results = sum(t.nbytes for t in itertools.chain(*state.cells, *state.memories))
    streams = sum(s.nbytes for s in itertools.chain(*inputs))
    for learned in (False, True):
        made, held = [], []

        def run(made=made, held=held):
            made.append(net(inputs, state))
            held.append(net._keeper.in_use)

        report = revflow.measure_memory(run)
        # Inputs are the caller's. Outputs of the steps, and the last state, are results of the call.
        # Of a stored step, outputs that a later step might take are counted besides.
        own = results + streams
        assert report.kept - own <= held[0] <= report.kept + 2 * streams, learned


def test_a_budget_of_an_empty_recurrence_and_of_no_gradient():
    net, (inputs, state) = budgeted().requires_grad_(False), given(steps=2)
    inputs = [tuple(s.detach() for s in pair) for pair in inputs]
    state = revflow.RecurrentState(*(tuple(tuple(t.detach() for t in cell) for cell in part) for part in state))
    for _ in range(2):
        outputs, _ = net(inputs, state)
        assert not outputs[-1][0].requires_grad
    assert net._keeper.in_use == 0


def test_options_go_with_slices_and_copies():
    net = recurrence(memory_budget="2MiB")
    assert net[1:].memory_budget == net.memory_budget == "2MiB"
    with pytest.raises(ValueError, match="memory_budget"):
        revflow.ReversibleRecurrence([Cell(False, 0.0)], memory_budget="much")
    assert recurrence().memory_budget == "min"
    assert len(net) == CELLS
