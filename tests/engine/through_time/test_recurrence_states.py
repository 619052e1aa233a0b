"""Gradients through time in every way of keeping states, against ordinary autograd: what is trained, drawn and rounded."""

import itertools

import pytest
import torch
from torch import nn

import revflow
from engine.cells import (
    CELLS,
    STEPS,
    Cell,
    along,
    assert_same,
    both,
    few_modes,
    given,
    loss_of,
    memories,
    plainly,
    recurrence,
    values,
)
from engine.nets import assert_close

some_modes = pytest.mark.parametrize("states", ["kept", "offloaded", 3])


@few_modes
@pytest.mark.parametrize("memory, gate", [(True, 0.0), (False, 12.0), (True, 17.0)])
def test_gradients_in_float32_with_saturated_gates(memory, states, gate):
    inputs, state = given(memory, dtype=torch.float32)
    net = recurrence(memory, dtype=torch.float32, gate=gate, states=states)
    assert_close(*both(net, inputs, state), tolerance=1e-5)


@some_modes
def test_a_loss_on_the_last_step_alone(states):
    assert_close(*both(recurrence(states=states), *given(), first=STEPS - 1))


@some_modes
def test_a_loss_on_one_output_in_the_middle(states):
    net, (inputs, state) = recurrence(states=states), given()
    assert_same(net, lambda step: along(step, inputs, state)[0][7][1].square().sum())


@some_modes
@pytest.mark.parametrize("frozen", [[0], [2], [0, 1]], ids=str)
def test_frozen_cells_and_inputs_without_gradient(states, frozen):
    net, (inputs, state) = recurrence(states=states), given()
    for k in frozen:
        net[k].requires_grad_(False)
    assert_close(*both(net, inputs, state))
    trained = [p for p in net.parameters() if p.requires_grad]
    inputs = [(a.detach(), b.detach()) for a, b in inputs]
    assert_close(*both(net, inputs, state, wanted=trained))
    state = revflow.RecurrentState(*(tuple(tuple(t.detach() for t in cell) for cell in part) for part in state))
    assert_close(*both(net, inputs, state, wanted=trained))


@some_modes
@pytest.mark.parametrize("k", range(CELLS))
def test_the_gradients_of_one_cell_alone(states, k):
    net = recurrence(states=states)
    assert_close(*both(net, *given(), wanted=list(net[k].parameters())))


@some_modes
@pytest.mark.parametrize("what", ["the first input", "an input", "a state", "the memory"])
def test_the_gradient_of_one_input_alone(states, what):
    inputs, state = given()
    tensor = {
        "the first input": inputs[0][0],
        "an input": inputs[5][1],
        "a state": state.cells[1][0],
        "the memory": state.memories[-1][0],
    }[what]
    assert_close(*both(recurrence(states=states), inputs, state, wanted=[tensor]))
    frozen = recurrence(states=states).requires_grad_(False)
    assert_close(*both(frozen, inputs, state, wanted=[tensor]))


@few_modes
def test_autocast_outside_of_the_backward_pass(states):
    net, (inputs, state) = recurrence(dtype=torch.float32, states=states), given(dtype=torch.float32)
    results = []
    for step in (net.step, net.plain_step):
        # With the cache ordinary autograd adds up a weight's gradients in bfloat16.
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            loss = loss_of(along(step, inputs, state))
        results.append([loss, *torch.autograd.grad(loss, list(net.parameters()))])
    assert_close(*results, tolerance=1e-6)


@few_modes
@pytest.mark.parametrize("where", ["update", "mix"])
def test_dropout_that_one_part_alone_draws(states, where):
    """Redrawn in every evaluation; and the loop's own draws are left alone."""
    net, (inputs, state) = recurrence(states=states), given(steps=7)
    for cell in net:
        of = cell.gates if where == "update" else cell.attention
        of.register_forward_hook(lambda m, args, out: nn.functional.dropout(out, 0.4))

    def program(step):
        loss = loss_of(along(step, inputs, state))
        return loss, loss + torch.rand(()).double()

    assert_same(net, lambda step: program(step)[1])
    before = [torch.get_rng_state()]
    loss = program(net.step)[0]
    before.append(torch.get_rng_state())
    loss.backward()
    assert not torch.equal(*before) and torch.equal(before[1], torch.get_rng_state())


@few_modes
def test_all_evaluations_get_the_same_strides(states):
    """They decide the last bit of some activations."""
    net, (inputs, state), seen = recurrence(states=states), given(steps=7), [set(), set()]
    inputs = [tuple(t.detach().to(memory_format=torch.channels_last) for t in pair) for pair in inputs]
    original = net[0].update

    def update(streams, state, memory, context):
        seen[revflow.is_recomputing()].add(tuple(t.stride() for t in (*streams, *state, *memory)))
        return original(streams, state, memory, context)

    net[0].update = update
    loss_of(net(inputs, state)).backward()
    assert seen[0] == seen[1] and (48, 1, 12, 3) in next(iter(seen[0]))


class Normed(Cell):
    """With BatchNorm, and buffers that count steps: one is changed in place, the other replaced."""

    def __init__(self, memory, dropout):
        super().__init__(memory, dropout)
        self.norm = nn.BatchNorm2d(3)
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("decay", torch.ones(()))

    def update(self, streams, state, memory, context):
        if self.training:
            self.steps += 1
            self.decay = self.decay * 0.9
        (h, c), memory = super().update((self.norm(streams[0]), streams[1]), state, memory, context)
        return (h * self.decay, c / self.steps.clone()), memory


@few_modes
def test_statistics_and_buffers_move_once(states):
    results = []
    for engine in (True, False):
        torch.manual_seed(0)
        net = revflow.ReversibleRecurrence([Normed(True, 0.0) for _ in range(2)], states=states).double()
        inputs, state = given(steps=7)
        state = revflow.RecurrentState(state.cells[:2], state.memories[:2])
        found = []
        for mode in (True, False):
            net.train(mode)
            loss = loss_of(along(net.step if engine else net.plain_step, inputs, state))
            net.train(not mode)  # which the backward pass does not look at
            found += [loss, *torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)]
            found += [b.double() for b in net.buffers()]
        assert [int(cell.norm.num_batches_tracked) for cell in net] == [7, 7]
        results.append(found)
    assert_close(*results)


class Rounded(torch.autograd.Function):
    """To the nearest number with 8 significant binary digits, ties to even; the derivative is that of the identity.

    By way of float32, as PyTorch does it.
    """

    @staticmethod
    def forward(ctx, x):
        mantissa, exponent = torch.frexp(x.float())
        return torch.ldexp(torch.round(mantissa * 2**8), exponent - 8).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad


@memories
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_bfloat16_against_rounding_by_hand(memory, dropout):
    net, (inputs, state) = recurrence(memory, dropout, states="bfloat16", guard="raise"), given(memory)

    def by_hand(streams, state):
        memory, cells, left = state.memories[-1], [], []
        for cell, its_state in zip(net, state.cells, strict=True):
            new, memory = cell.update(streams, its_state, memory, {})
            new, memory = tuple(map(Rounded.apply, new)), tuple(map(Rounded.apply, memory))
            streams = cell.mix(streams, new, {})
            cells.append(new)
            left.append(memory)
        return streams, revflow.RecurrentState(tuple(cells), tuple(left))

    wanted, results = [*net.parameters(), *inputs[0], *state.cells[1]], []
    for step in (net.step, by_hand):
        torch.manual_seed(7)
        outputs, last = along(step, inputs, state)
        handed_out = [*itertools.chain(*last.cells, *last.memories)]
        loss = loss_of((outputs, last))
        results.append([*handed_out, loss, *torch.autograd.grad(loss, wanted)])
        assert all(torch.equal(t, t.bfloat16().double()) for t in handed_out)
    assert_close(*results)
    unrounded = loss_of(plainly(recurrence(memory, dropout), inputs, state))
    assert dropout or abs(1 - (results[0][len(handed_out)] / unrounded).item()) > 1e-6  # the rounding is no pretence


class Low(revflow.RecurrentCell):
    """Under autocast its state is as low as the convolution leaves it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def update(self, streams, state, memory, context):
        return (self.linear(streams[0] + state[0]),), ()

    def mix(self, streams, state, context):
        return (streams[0] + torch.tanh(state[0]),)


@few_modes
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_states_that_are_low_already_stay_as_they_are(states, low):
    torch.manual_seed(0)
    net = revflow.ReversibleRecurrence([Low(), Low()], states=states, guard="raise")
    x, state = values(1, torch.float32, (3, 4)), values(2, torch.float32, (3, 4))
    results = []
    for step in (net.step, net.plain_step, recurrence_of(net, "kept").plain_step):
        with torch.autocast("cpu", low, cache_enabled=False):
            outputs, last = along(step, [(x,)] * 5, revflow.RecurrentState(((state,), (state,)), ((), ())))
        assert all(h.dtype == low for (h,) in last.cells)
        loss = sum(o.float().square().sum() for (o,) in outputs)
        results.append([loss, *(h.float() for (h,) in last.cells), *torch.autograd.grad(loss, [x, *net.parameters()])])
    for expected in results[1:]:
        assert_close(results[0], expected, 1e-6)


def recurrence_of(cells, states):
    return revflow.ReversibleRecurrence(list(cells), states=states)
