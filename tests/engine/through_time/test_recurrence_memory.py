"""What a step keeps, the peak of a backward pass, and how often update and mix run: to the byte and to the call.

All bytes are counted in streams: inputs, states and memories are of one size here.
"""

import pytest
import torch

import revflow
from engine.cells import CELLS, STEPS, Wide, given, loss_of, memories, recurrence

STREAM = given(dtype=torch.float32)[0][0][0].nbytes
RESULTS = 3 * CELLS  # of a step: two states and a memory a cell


def kept(steps, memory=True, taught=False, **options):
    """By a forward pass in float32, its results included. What is taught was there before."""
    net = recurrence(memory, dtype=torch.float32, **{"guard": "off", **options})
    inputs, state = given(memory, steps, torch.float32)
    inputs[1:] = inputs[1:] if taught else [None] * (steps - 1)
    return revflow.measure_memory(lambda: net(inputs, state)).kept


@memories
@pytest.mark.parametrize(
    "states, share", [("kept", 1), (1, 1), ("bfloat16", 1 / 2), ("offloaded", 0), (3, 1 / 3), (6, 1 / 6)]
)
def test_what_a_step_keeps(memory, states, share):
    """Its input streams, and of its results what `states` says; over whole periods."""
    results = CELLS * (3 if memory else 2)
    for steps in (4, 5):
        found = kept(steps + 6, memory, states=states) - kept(steps, memory, states=states)
        assert found == 6 * STREAM * (2 + results * share)


def test_which_steps_keep_their_results():
    """Every third; and the last one's are handed out, so they are there in any case."""
    found = [kept(steps, states=3) - kept(steps, states=100) for steps in range(1, 10)]
    assert found == [STREAM * RESULTS * count for count in (0, 0, 0, 1, 1, 1, 2, 2, 2)]


def test_in_the_cpus_memory_nothing_stays_on_the_device():
    """But the last state, which is handed out, and the outputs: here x1 has passed two cells as it was."""
    assert kept(STEPS, taught=True, states="offloaded") == STREAM * (2 * STEPS + RESULTS)


@pytest.mark.parametrize("states", ["kept", "offloaded", 3])
def test_states_that_were_changed_are_kept_besides(states):
    def masked(count):
        net, (inputs, state) = recurrence(dtype=torch.float32, states=states, guard="off"), given(dtype=torch.float32)

        def run():
            nonlocal state
            now = net.step(inputs[0], state)[1]
            for t in range(1, 4):
                h, c = now.cells[0]
                if t <= count:
                    now = now._replace(cells=((h.view_as(h) * 0.5, c), *now.cells[1:]))
                now = net.step(inputs[t], now)[1]
            return now

        return revflow.measure_memory(run).kept

    # One tensor more for every mask; beside it, nothing.
    assert masked(2) - masked(1) == STREAM


def peak(steps, taught=True, **options):
    """Of a training step whose outputs are dropped on the way."""
    net = recurrence(dtype=torch.float32, guard="off", **options)
    inputs, state = given(steps=steps, dtype=torch.float32)

    def train():
        now, output = state, inputs[0]
        for t in range(steps):
            output, now = net.step(inputs[t] if taught else output, now)
        loss_of(([output], now)).backward()

    return revflow.measure_memory(train).peak


# Of taught inputs each step gets two gradients, and keeps no stream of its own. So a pass that freed nothing before its end
# would grow by two more.
@pytest.mark.parametrize(
    "states, streams",
    [("kept", RESULTS), ("bfloat16", RESULTS / 2), ("offloaded", 2), (3, RESULTS / 3), (6, 2)],
    ids=str,
)
def test_the_peak_grows_with_what_is_kept(states, streams):
    assert peak(18, states=states) - peak(12, states=states) == 6 * STREAM * streams


@pytest.mark.parametrize("states, share", [("kept", 1), (3, 1 / 3)])
def test_the_peak_grows_with_what_is_kept_where_outputs_are_fed_back(states, share):
    found = peak(12, taught=False, states=states) - peak(6, taught=False, states=states)
    assert found == 6 * STREAM * (2 + RESULTS * share)


@pytest.mark.parametrize("n", [2, 6])
def test_the_peak_of_computing_again(n):
    """Beyond what is kept no more than any backward pass needs, and the results of one period."""
    extra = peak(12, taught=False, states=n) - STREAM * 12 * (2 + RESULTS / n)
    base = peak(12, taught=False, states="kept") - STREAM * 12 * (2 + RESULTS)
    assert extra <= base + STREAM * RESULTS * (n - 1)


@pytest.mark.parametrize("steps", [1, 5, 12])
@pytest.mark.parametrize(
    "states, n", [("kept", 1), ("bfloat16", 1), ("offloaded", 1), (1, 1), (2, 2), (3, 3), (5, 5), (100, 100)]
)
def test_evaluations(steps, states, n):
    net, (inputs, state) = recurrence(states=states), given(steps=steps)
    loss_of(net(inputs, state)).backward()
    again = steps - steps // n  # steps whose results were not kept
    # The last cell's mix is neither replayed nor computed again: no cell needs its output.
    *lower, last = [cell.calls for cell in net]
    assert lower == [[2 * steps + again, 3 * steps + again]] * (CELLS - 1)
    assert last == [2 * steps + again, 2 * steps]


def test_each_recurrence_counts_its_own_steps():
    first, second, (inputs, state) = recurrence(states=3), recurrence(states=3), given(steps=3)
    loss_of(second(inputs[1:], first(inputs[:1], state)[1])).backward()
    assert [[cell.calls[0] for cell in net] for net in (first, second)] == [[3] * CELLS, [6] * CELLS]


def test_a_partial_pass_runs_no_cell_that_it_does_not_need():
    net, (inputs, state) = recurrence(states="kept"), given()
    loss = loss_of(net(inputs, state))
    torch.autograd.grad(loss, inputs[-1][0])  # the last step's input
    assert [cell.calls for cell in net] == [[STEPS + 1, STEPS + 2]] * (CELLS - 1) + [[STEPS + 1, STEPS + 1]]


def test_the_guard_keeps_little():
    for steps in (3, 9):
        assert 0 < kept(steps, guard="warn") - kept(steps) <= 2048 * steps


def test_gradients_of_all_steps_are_summed_in_one_buffer():
    """There is never a cell's whole set of gradients beside the sums, but a weight's or two."""
    net, x = revflow.ReversibleRecurrence([Wide()]), torch.ones(1, 64)
    weights = sum(p.nbytes for p in net.parameters())
    outputs, _ = net([(x,)] * 5, revflow.RecurrentState(((x,),), ((),)))
    loss = outputs[-1][0].sum()
    assert weights <= revflow.measure_memory(loss.backward).peak < weights * (1 + 3 / 8)
