"""The guard of a recurrence: it names the cell that errs, is silent about all others, and keeps little."""

import gc
import itertools
import random
import time
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import revflow
from engine.cells import CELLS, Cell, few_modes, given, loss_of, recurrence, values, without_collector
from engine.nets import assert_close
from revflow._guard.recurrences import Found
from revflow._through_time.passes import BackwardPass

exact_modes = pytest.mark.parametrize("states", ["kept", "offloaded", 3, 100])


class Clock:
    """A number that is another one in each call."""

    def numpy(self, cell):
        return float(np.random.uniform(0.5, 1.5))

    def counter(self, cell):
        self.count = getattr(self, "count", 0) + 1
        return 1 + 0.1 * self.count

    def wall_clock(self, cell):
        return 1 + time.perf_counter_ns() % 1_000_003 / 1_000_003


def make_err(cell, method, number):
    """Multiply what `update` is given, or `mix` returns, by `number(cell)`."""
    original = getattr(cell, method)
    times = lambda tensors: tuple(number(cell) * t for t in tensors)  # noqa: E731
    if method == "update":
        cell.update = lambda streams, *rest: original(times(streams), *rest)
    else:
        cell.mix = lambda *given: times(original(*given))


@exact_modes
@pytest.mark.parametrize("number, k", [("numpy", 0), ("numpy", 1), ("numpy", 2), ("counter", 0), ("wall_clock", 2)])
def test_an_update_that_does_not_repeat(states, number, k):
    np.random.seed(0)
    net = recurrence(states=states)
    make_err(net[k], "update", getattr(Clock(), number))
    loss = loss_of(net(*given(steps=5)))
    with pytest.raises(revflow.ReconstructionError, match=rf"cell {k} \(Cell\).*random numbers that are not torch"):
        loss.backward()


@exact_modes
@pytest.mark.parametrize("k", [0, 1, 2])
def test_a_mix_that_does_not_repeat(states, k):
    """It shows in the state of the cell above; the last cell's in the streams that leave the step."""
    np.random.seed(0)
    net = recurrence(states=states)
    make_err(net[k], "mix", Clock().numpy)
    loss = loss_of(net(*given(steps=5)))
    with pytest.raises(revflow.ReconstructionError, match=rf"cell {min(k + 1, 2)} \(Cell\)"):
        loss.backward()


@few_modes
def test_a_number_changed_between_forward_and_backward(states):
    """Of states that are computed again all evaluations err alike: what left the steps tells."""
    net, number = recurrence(states=states), [1.0]
    make_err(net[2], "mix", lambda cell: number[0])
    loss = loss_of(net(*given(steps=5)))
    number[0] = 2.0
    with pytest.raises(revflow.ReconstructionError, match=r"cell 2 \(Cell\)"):
        loss.backward()


@few_modes
def test_off_is_silent(states):
    net = recurrence(states=states, guard="off")
    for cell, method in itertools.product(net, ("update", "mix")):
        make_err(cell, method, Clock().counter)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_of(net(*given(steps=4))).backward()


class Perturbed(Cell):
    def update(self, *given):
        state, memory = super().update(*given)
        return tuple((1 + revflow.is_recomputing() * self.error) * t for t in state), memory


def perturbed(error, dtype, **options):
    torch.manual_seed(0)
    net = revflow.ReversibleRecurrence([Perturbed(True, 0.0) for _ in range(CELLS)], **options).to(dtype)
    for cell in net:
        cell.error = error
    return net


SMALL = [("kept", 1e-3, torch.float32), ("offloaded", 1e-3, torch.float32), (3, 1e-3, torch.float32)]
SMALL += [("kept", 1e-6, torch.float64), (100, 1e-6, torch.float64), ("bfloat16", 0.3, torch.float32)]


@pytest.mark.parametrize("states, error, dtype", SMALL, ids=str)
def test_small_errors_warn_once(states, error, dtype):
    net = perturbed(error, dtype, states=states)
    with pytest.warns(revflow.ReconstructionWarning, match=r"cell \d \(Perturbed\).* with an error of") as found:
        for _ in range(2):
            loss_of(net(*given(steps=5, dtype=dtype))).backward()
    assert len(found) == 1
    net = perturbed(error, dtype, states=states, guard="raise")
    loss = loss_of(net(*given(steps=5, dtype=dtype)))
    with pytest.raises(revflow.ReconstructionError, match=r"cell \d \(Perturbed\)"):
        loss.backward()


@pytest.mark.parametrize("states, error", [("kept", 1e-1), (3, 1e-1), ("bfloat16", 2.0)], ids=str)
def test_large_errors_raise_in_any_case(states, error):
    loss = loss_of(perturbed(error, torch.float32, states=states)(*given(steps=5, dtype=torch.float32)))
    with pytest.raises(revflow.ReconstructionError, match=r"raises from \de-0[12]"):
        loss.backward()


@pytest.mark.filterwarnings("error")
def test_healthy_runs_are_silent():
    choose = random.Random(0)
    for number in range(200):
        states = choose.choice(["kept", "bfloat16", "offloaded", 1, 2, 3, 50])
        dtype, low = choose.choice([torch.float32, torch.float64]), choose.random() < 0.2
        memory, steps = choose.random() < 0.5, choose.randint(1, 4)
        net = recurrence(
            memory, choose.choice([0.0, 0.5]), dtype, choose.choice([0.0, 15.0]), states=states, guard="raise"
        )
        scale = choose.choice([1e-3, 1.0, 30.0])
        inputs, state = given(memory, steps, dtype)
        inputs = [tuple(scale * t for t in pair) for pair in inputs]
        torch.manual_seed(number)
        with torch.autocast("cpu", torch.bfloat16, enabled=low and dtype == torch.float32):
            loss = loss_of(net(inputs, state))
        torch.rand(3)
        loss.backward()


class Grows(revflow.RecurrentCell):
    """Overflows in the third step."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def update(self, streams, state, memory, context):
        return (1e20 * (self.linear(streams[0]) + state[0]),), ()

    def mix(self, streams, state, context):
        return (streams[0] + state[0],)


@few_modes
@pytest.mark.filterwarnings("error")
def test_overflow_is_no_false_alarm(states):
    net = revflow.ReversibleRecurrence([Grows(), Grows()], states=states)
    state = revflow.RecurrentState(((torch.ones(3, 4),), (torch.ones(3, 4),)), ((), ()))
    outputs, _ = net([(values(1, torch.float32, (3, 4)),)] * 4, state)
    assert not outputs[-1][0].isfinite().all()
    outputs[-1][0].sum().backward()


class Watched(Cell):
    """Its name tells its evidence from what other tests have left."""


@few_modes
def test_its_evidence_goes_with_the_pass(states):
    cells = [Watched(True, 0.0) for _ in range(CELLS)]
    net, (inputs, state) = revflow.ReversibleRecurrence(cells, states=states).double(), given(steps=4)
    with without_collector() as left:
        loss = loss_of(net(inputs, state))
        loss.backward(retain_graph=True)
        assert left(BackwardPass) == 0
        assert not [o for o in gc.get_objects() if type(o) is Found and o.cell.endswith("(Watched)")]


def test_a_partial_pass_is_watched():
    net = recurrence()
    make_err(net[1], "update", Clock().counter)
    loss = loss_of(net(*given(steps=4)))
    wanted = list(net[1].parameters())
    with pytest.raises(revflow.ReconstructionError, match=r"cell 1 \(Cell\)"):
        torch.autograd.grad(loss, wanted)


def test_each_recurrence_has_its_own_guard():
    """Of two in one backward pass the one that errs is heard, and in its own mode."""
    (inputs, state), silent, watched = given(steps=4), recurrence(guard="off"), recurrence()
    make_err(silent[0], "update", Clock().counter)
    loss = loss_of(silent(inputs, state)) + loss_of(watched(inputs, state))
    found = torch.autograd.grad(loss, list(watched.parameters()), retain_graph=True)
    loss.backward()
    assert_close([p.grad for p in watched.parameters()], found)
