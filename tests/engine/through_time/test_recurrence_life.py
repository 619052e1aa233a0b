"""How long the graph of a recurrence lives, what errors leave behind, and what runs around it."""

import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import revflow
from engine.cells import (
    CELLS,
    STEPS,
    along,
    few_modes,
    given,
    loss_of,
    plainly,
    recurrence,
    without_collector,
)
from engine.nets import assert_close
from revflow._through_time.passes import BackwardPass
from revflow._through_time.steps import TimeStep


def parameters(net):
    return list(net.parameters())


def expected_of(net, inputs, state):
    torch.manual_seed(7)
    return torch.autograd.grad(loss_of(plainly(net, inputs, state)), parameters(net))


@few_modes
def test_nothing_stays_behind(states):
    net, (inputs, state) = recurrence(states=states), given()
    with without_collector() as left:
        loss = loss_of(net(inputs, state))
        for k in range(10):
            torch.autograd.grad(loss, [*parameters(net), inputs[k][0]][k % CELLS], retain_graph=True)
        assert left(TimeStep) == STEPS and left(BackwardPass) == 0
        del loss
        assert left(TimeStep) == 0


@few_modes
def test_no_byte_is_left_behind(states):
    net, (inputs, state) = recurrence(states=states), given(steps=7)
    wanted = [*parameters(net)[:1], inputs[5][0], state.cells[0][0]]

    def use():
        loss = loss_of(net(inputs, state))
        for tensor in wanted:
            torch.autograd.grad(loss, tensor, retain_graph=True)
        torch.autograd.grad(loss, wanted)
        net(inputs, state)

    with without_collector():
        assert revflow.measure_memory(use).kept == 0


@few_modes
def test_two_backwards_over_one_graph(states):
    net = recurrence(dropout=0.3, states=states)
    loss = loss_of(net(*given()))
    first = torch.autograd.grad(loss, parameters(net), retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, parameters(net))))
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@few_modes
def test_a_state_whose_graph_is_gone(states):
    net, (inputs, state) = recurrence(states=states), given()
    outputs, last = net(inputs[:4], state)
    loss_of((outputs, last)).backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss_of(net(inputs[4:], last)).backward()


@pytest.mark.parametrize("states", ["kept", "bfloat16", "offloaded", 1])
def test_a_graph_that_is_gone_in_part(states):
    """A pass asks for no states but those that it needs."""
    net, (inputs, state) = recurrence(states=states), given(steps=3)
    passed, losses = state, []
    for streams in inputs:
        output, passed = net.step(streams, passed)
        losses.append(output[0].square().sum())
    torch.autograd.grad(losses[0], parameters(net))
    (found,) = torch.autograd.grad(losses[2], inputs[2][0])
    expected = plainly(net, inputs, state)[0][2][0].square().sum()
    assert_close([found], torch.autograd.grad(expected, inputs[2][0]))


@few_modes
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=str)
def test_forwards_before_backwards(states, order):
    net, (inputs, state), results = recurrence(dropout=0.3, states=states), given(steps=7), []
    for step in (net.step, net.plain_step):
        torch.manual_seed(7)
        losses = [loss_of(along(step, inputs[k:], state)) for k in range(2)]
        results.append([g for k in order for g in torch.autograd.grad(losses[k], parameters(net))])
    assert_close(*results)


@few_modes
def test_a_partial_pass_within_another(states):
    """A hook differentiates the graph that is being differentiated: what the two lay aside does not mix."""
    net, (inputs, state), inner = recurrence(states=states), given(steps=7), []
    (first, _), between = (
        inputs[0],
        state.cells[1][0],
    )  # whose gradient comes when its step's first cell is still to run
    loss = loss_of(net(inputs, state))
    hook = between.register_hook(lambda g: inner.extend(torch.autograd.grad(loss, first, retain_graph=True)))
    found = torch.autograd.grad(loss, [between, *parameters(net), first], retain_graph=True)
    hook.remove()
    assert_close(found[1:-1], expected_of(net, inputs, state))
    assert torch.equal(inner[0], found[-1])


class InjectedError(Exception):
    pass


class Fails(torch.autograd.Function):
    """A user's operation, whose derivative fails if `switch` says so."""

    @staticmethod
    def forward(ctx, x, switch):
        ctx.switch = switch
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if ctx.switch:
            raise InjectedError
        return grad, None


def failing(function, calls):
    """`function`, which fails in its `calls`-th call from now on."""

    @functools.wraps(function)
    def call(*given):
        nonlocal calls
        calls -= 1
        if not calls:
            raise InjectedError
        return function(*given)

    return call


@few_modes
@pytest.mark.parametrize("part", ["update", "mix"])
@pytest.mark.parametrize("calls", [1, 9])
def test_an_exception_in_the_backward_pass_and_a_retry(states, part, calls):
    """In the replay, in a computation of states that were not kept, in the second evaluation."""
    net, (inputs, state) = recurrence(dropout=0.3, states=states), given()
    expected = expected_of(net, inputs, state)
    torch.manual_seed(7)
    with without_collector() as left:
        loss, before = loss_of(net(inputs, state)), torch.get_rng_state()
        setattr(net[1], part, failing(getattr(net[1], part), calls))
        with pytest.raises(InjectedError):
            loss.backward(retain_graph=True)
        assert left(TimeStep) == STEPS and left(BackwardPass) == 0 and not revflow.is_recomputing()
        assert torch.equal(torch.get_rng_state(), before)
        delattr(net[1], part)
        assert_close(torch.autograd.grad(loss, parameters(net)), expected)


@few_modes
def test_an_exception_between_two_steps_and_a_retry(states):
    net, (inputs, state), switch = recurrence(states=states), given(), []
    expected = expected_of(net, inputs, state)
    outputs, now = net(inputs[:5], state)
    (h, c), *rest = now.cells
    more, last = net(inputs[5:], now._replace(cells=((Fails.apply(h, switch), c), *rest)))
    loss = loss_of((outputs + more, last))
    switch.append("on")
    with without_collector() as left:
        with pytest.raises(InjectedError):
            loss.backward(retain_graph=True)
        assert left(BackwardPass) == 0
    switch.clear()
    assert_close(torch.autograd.grad(loss, parameters(net)), expected)


@few_modes
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_within_a_checkpoint(states, use_reentrant):
    net, (inputs, state) = recurrence(dropout=0.3, states=states), given(steps=7)

    def run(*flat):
        return loss_of(net([flat[k : k + 2] for k in range(0, len(flat), 2)], state))

    torch.manual_seed(7)
    checkpoint(run, *(t for pair in inputs for t in pair), use_reentrant=use_reentrant).backward()
    assert_close([p.grad for p in net.parameters()], expected_of(net, inputs, state))


@few_modes
@pytest.mark.parametrize(
    "around", [torch.autograd.graph.save_on_cpu, torch.autograd.detect_anomaly], ids=lambda f: f.__name__
)
@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
def test_hooks_on_what_is_saved_and_anomaly_mode(states, around):
    net, (inputs, state) = recurrence(dropout=0.3, states=states), given(steps=7)
    with around():
        torch.manual_seed(7)
        found = torch.autograd.grad(loss_of(net(inputs, state)), parameters(net))
    assert_close(found, expected_of(net, inputs, state))


@few_modes
def test_what_a_step_has_saved_is_taken_once_a_pass(states):
    """Hooks may fetch it from far away, or compute it."""
    net, (inputs, state), taken = recurrence(states=states), given(steps=7), []
    saved = []

    def unpack(k):
        taken[k] += 1
        return saved[k]

    def pack(t):
        saved.append(t.detach())
        taken.append(0)
        return len(saved) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss = net(inputs, state)[0][-1][0].sum()
    loss.backward()
    assert max(taken) == 1


@few_modes
def test_second_derivatives_are_refused(states):
    """In a loss too whose other parts have some: not one is left out in silence."""
    net, (inputs, state) = recurrence(states=states), given(steps=7)
    for wanted in (next(net.parameters()), inputs[0][0], state.cells[1][0]):
        loss = loss_of(net(inputs, state))
        (gradient,) = torch.autograd.grad(loss, wanted, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            (loss + gradient.square().sum()).backward()


@pytest.mark.parametrize("states", ["kept", 200])
def test_long_sequences(states):
    """Python's stack is no deeper for them, in the backward pass as in freeing what was never used."""
    net, (inputs, state) = recurrence(dtype=torch.float32, states=states)[:1], given(steps=1, dtype=torch.float32)
    state = revflow.RecurrentState(state.cells[:1], state.memories[:1])
    with without_collector() as left:
        loss = loss_of(net(inputs + [None] * 499, state), first=499)
        loss.backward()
        net(inputs + [None] * 499, state)
        del loss
        assert left(TimeStep) == 0
    assert [cell.calls[0] for cell in net] == [3 * 500 - (500 // 200 if states == 200 else 500) + 500]
    assert all(p.grad.isfinite().all() for p in net.parameters())
