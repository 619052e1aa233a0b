"""States and streams that go other ways than from one step to the next: masked, branched, swapped, from other recurrences."""

import pytest
import torch
from torch import nn

import revflow
from engine.cells import along, assert_same, few_modes, given, loss_of, recurrence, values

INPUTS, BEFORE = given()


def masked(step):
    """Some states of some steps, all of others."""
    state, outputs = BEFORE, []
    for t, streams in enumerate(INPUTS):
        output, state = step(streams, state)
        outputs.append(output)
        if t % 3 == 1:
            state = state._replace(cells=tuple((h * 0.5, c) for h, c in state.cells))
        if t % 5 == 4:
            state = revflow.RecurrentState(*(tuple(tuple(0.3 * t for t in c) for c in part) for part in state))
    return loss_of((outputs, state))


def branched(step):
    """One state continued twice, a third time with parts of both."""
    outputs, state = along(step, INPUTS[:4], BEFORE)
    more, a = along(step, INPUTS[4:8], state)
    others, b = along(step, INPUTS[8:11], state)
    both = a._replace(cells=(a.cells[0], b.cells[1], state.cells[2]), memories=(*a.memories[:2], b.memories[2]))
    last, both = along(step, INPUTS[2:5], both)
    return loss_of((outputs + more + others + last, both)) + loss_of(([], b)) + loss_of(([], state))


def swapped(step):
    """Between cells, within cells, and a state in a memory's place."""
    state, outputs = BEFORE, []
    for t, streams in enumerate(INPUTS):
        output, state = step(streams, state)
        outputs.append(output)
        if t % 4 == 1:
            state = state._replace(cells=(state.cells[2], state.cells[0][::-1], state.cells[1]))
        if t % 4 == 2:
            (h, c), *rest = state.cells
            state = revflow.RecurrentState(((state.memories[-1][0], c), *rest), (*state.memories[:2], (h,)))
    return loss_of((outputs, state))


def older(step):
    """A part of the state comes from two steps before, one from outside."""
    before, outputs = [BEFORE, BEFORE], []
    for t, streams in enumerate(INPUTS):
        a, b = before[-2:]
        state = b._replace(cells=(b.cells[0], a.cells[1], BEFORE.cells[2] if t == 5 else b.cells[2]))
        output, state = step(streams, state)
        outputs.append(output)
        before.append(state)
    return loss_of((outputs, before[-1]))


def crossed(step):
    """The streams that left a step become a state and a memory of the next, states become streams."""
    state, outputs, streams = BEFORE, [], INPUTS[0]
    for _ in range(7):
        output, state = step(streams, state)
        outputs.append(output)
        streams = output[1], state.cells[0][1]
        state = revflow.RecurrentState(
            ((output[0], state.cells[1][0]), *state.cells[1:]), (*state.memories[:2], output[1:])
        )
    return loss_of((outputs, state))


def detached(step):
    """Truncated back-propagation: four steps a piece."""
    state, loss = BEFORE, 0
    for t in range(0, 12, 4):
        outputs, state = along(step, INPUTS[t : t + 4], state)
        loss = loss + (t + 1) * loss_of((outputs, state))
        state = revflow.RecurrentState(*(tuple(tuple(s.detach() for s in c) for c in part) for part in state))
    return loss


def partly_without_gradients(step):
    with torch.no_grad():
        _, state = along(step, INPUTS[:3], BEFORE)
    return loss_of(along(step, INPUTS[3:], state))


def inner(step):
    """The gradients of tensors on the way are asked for as well."""
    states, outputs = [BEFORE], []
    for streams in INPUTS[:8]:
        output, state = step(streams, states[-1])
        states.append(state)
        outputs.append(output)
    wanted = states[3].cells[1][0], states[6].cells[0][1], states[4].memories[2][0], outputs[2][0], outputs[6][1]
    return loss_of((outputs, states[-1])), *wanted


def hooked(step):
    """A hook clips the gradients that go back in time."""
    state, outputs = BEFORE, []
    for streams in INPUTS:
        output, state = step(streams, state)
        outputs.append(output)
        for h, c in state.cells:
            h.register_hook(lambda g: g.clamp(-0.5, 0.5))
            c.register_hook(lambda g: 0.9 * g)
    return loss_of((outputs, state))


PROGRAMS = [masked, branched, swapped, older, crossed, detached, partly_without_gradients, inner, hooked]


@few_modes
def test_a_parameter_that_is_frozen_for_a_step(states):
    net = recurrence(states=states)
    weight = net[1].gates.weight

    def frozen(step):
        state, outputs = BEFORE, []
        for t, streams in enumerate(INPUTS[:5]):
            weight.requires_grad_(t != 2)
            output, state = step(streams, state)
            outputs.append(output)
        weight.requires_grad_()
        return loss_of((outputs, state))

    assert_same(net, frozen)


@few_modes
def test_other_parameters_in_each_step(states):
    net = recurrence(states=states)
    factors = values(7, shape=(4,))

    def substituted(step):
        state, outputs = BEFORE, []
        module = nn.Module()
        module.net, module.forward = net, step
        for t, streams in enumerate(INPUTS[:4]):
            own = {f"net.{name}": p * factors[t] if t != 1 else p for name, p in net.named_parameters()}
            output, state = torch.func.functional_call(module, own, (streams, state))
            outputs.append(output)
        return loss_of((outputs, state))

    assert_same(net, substituted, [factors, *net.parameters()])


@few_modes
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_ways_through_time(states, program):
    # The guard sees every state that was found in the wrong place.
    assert_same(recurrence(states=states, guard="raise", dropout=0.2), program)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
@pytest.mark.parametrize("states", ["offloaded", 3])
def test_ways_through_time_in_a_partial_pass(states, program):
    net = recurrence(states=states)
    for wanted in ([INPUTS[3][0]], list(net[1].parameters())):
        assert_same(net, program, wanted)


@few_modes
@pytest.mark.parametrize("others", ["kept", "bfloat16", "offloaded", 3])
def test_two_recurrences_that_take_turns(states, others):
    """And hand their states to each other, whatever way each keeps them."""
    nets = nn.ModuleList([recurrence(states=states), recurrence(states=others)])

    class Turns(nn.Module):
        def step(self, streams, state, which=0):
            return nets[which].step(streams, state)

        def plain_step(self, streams, state, which=0):
            return nets[which].plain_step(streams, state)

    def program(step):
        state, outputs = BEFORE, []
        for t, streams in enumerate(INPUTS[:9]):
            output, state = step(streams, state, which=t // 2 % 2)
            outputs.append(output)
        return loss_of((outputs, state))

    assert_same(Turns(), program, list(nets.parameters()))


@few_modes
def test_one_recurrence_upon_another(states):
    """The outputs of the first are the inputs of the second, and their losses are added."""
    lower, upper = recurrence(states=states), recurrence(states=3)

    def loss(method):
        outputs, last = along(getattr(lower, method), INPUTS[:7], BEFORE)
        return loss_of((outputs, last)) + loss_of(along(getattr(upper, method), outputs, last))

    leaves = [*lower.parameters(), *upper.parameters(), *INPUTS[0]]
    found, expected = (torch.autograd.grad(loss(method), leaves) for method in ("step", "plain_step"))
    assert_all_close(found, expected)


def assert_all_close(found, expected):
    assert all(torch.allclose(f, e, rtol=1e-9, atol=1e-12) for f, e in zip(found, expected, strict=True))


class Odd(revflow.RecurrentCell):
    """What a cell may return: kinds 0 to 3."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(4, 4)

    def update(self, streams, state, memory, context):
        h, c, n = state
        new = torch.tanh(self.linear(streams[0] + h * (n > 1)) + memory[0])
        return [
            ((c, h, n + 1), memory),  # what it was given
            ((new, new, n + 1), (new,)),  # one tensor at three places
            ((new.mean(0, keepdim=True).expand(3, 4), c, n), (new.t().contiguous().t(),)),  # expanded, and transposed
            ((new, torch.zeros_like(c), n * 2), (memory[0].detach(),)),  # what has no gradient
        ][self.kind]

    def mix(self, streams, state, context):
        return (streams[0] + torch.sigmoid(state[0]) * state[1] + state[2],)


@few_modes
@pytest.mark.parametrize("kinds", [(0, 1), (1, 0, 1), (2, 1), (1, 2), (3, 1, 2), (0, 1, 2, 3)], ids=str)
def test_odd_states(states, kinds):
    torch.manual_seed(0)
    net = revflow.ReversibleRecurrence([Odd(kind) for kind in kinds], states=states, guard="raise").double()
    x = values(1, shape=(3, 4))
    cell = lambda k: (values(k, shape=(3, 4)), values(k + 1, shape=(3, 4)), torch.zeros((), dtype=torch.long))  # noqa: E731
    memories = tuple((values(20 + k, shape=(3, 4)),) for k in range(len(kinds)))
    state = revflow.RecurrentState(tuple(cell(2 + 2 * k) for k in range(len(kinds))), memories)
    program = lambda step: loss_of(along(step, [(x,), *[None] * 6], state))  # noqa: E731
    assert_same(net, program, [x, *(p for p in net.parameters()), *memories[-1], *state.cells[0][:2]])


class Stateless(revflow.RecurrentCell):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def update(self, streams, state, memory, context):
        return (), ()

    def mix(self, streams, state, context):
        return (torch.tanh(self.linear(streams[0])),)


@few_modes
def test_cells_without_a_state(states):
    net = revflow.ReversibleRecurrence([Stateless(), Stateless()], states=states).double()
    x = values(1, shape=(3, 4))
    state = revflow.RecurrentState(((), ()), ((), ()))
    assert_same(net, lambda step: loss_of(along(step, [(x,), *[None] * 4], state)), [x, *net.parameters()])


class Decay(revflow.RecurrentCell):
    """A cell that learns nothing."""

    def update(self, streams, state, memory, context):
        return (torch.tanh(state[0] + streams[0]), state[1]), memory

    def mix(self, streams, state, context):
        return streams[1] + state[0], streams[0]


@few_modes
def test_a_cell_without_parameters(states):
    net = revflow.ReversibleRecurrence([recurrence()[0], Decay(), recurrence()[2]], states=states)
    assert_same(net, lambda step: loss_of(along(step, INPUTS[:5], BEFORE)), [INPUTS[0][1], *net.parameters()])
