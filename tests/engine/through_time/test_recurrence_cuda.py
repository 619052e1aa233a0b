"""ReversibleRecurrence on a GPU: where states leave it, they come back unchanged."""

import pytest
import torch

import revflow
from engine.cells import given, loss_of, modes, plainly, recurrence
from engine.nets import assert_close

pytestmark = pytest.mark.cuda


def on_cuda(steps=12, dtype=torch.float64):
    move = lambda tensors: tuple(t.detach().cuda().requires_grad_() for t in tensors)  # noqa: E731
    inputs, state = given(steps=steps, dtype=dtype)
    return [move(pair) for pair in inputs], revflow.RecurrentState(*(tuple(map(move, part)) for part in state))


def gradients(net, run, inputs, state):
    torch.manual_seed(7)
    outputs, last = run(inputs, state)
    loss = loss_of(([tuple(t.cpu() for t in o) for o in outputs], on_cpu(last)))
    return [loss, *torch.autograd.grad(loss, [*net.parameters(), *inputs[0], *state.cells[0]])]


def on_cpu(state):
    return revflow.RecurrentState(*(tuple(tuple(t.cpu() for t in cell) for cell in part) for part in state))


@modes
def test_gradients(states):
    net, (inputs, state) = recurrence(dropout=0.3, states=states).cuda(), on_cuda()
    found = gradients(net, net, inputs, state)
    assert_close(found, gradients(net, lambda *a: plainly(net, *a), inputs, state))


def test_offloaded_is_kept_bit_for_bit():
    """Long enough, and without a wait in between, for a copy to be late where nobody waits for it."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        inputs, state = on_cuda(60, torch.float32)
        results = []
        for states in ("kept", "offloaded"):
            net = recurrence(dtype=torch.float32, states=states).cuda()
            results.append(gradients(net, net, inputs, state))
        assert all(map(torch.equal, *results))
    finally:
        torch.use_deterministic_algorithms(deterministic)


def test_what_offloaded_leaves_on_the_device():
    def kept(steps, states):
        net = recurrence(dtype=torch.float32, states=states, guard="off").cuda()
        inputs, state = on_cuda(1, torch.float32)
        net([inputs[0], None], state)  # libraries take their workspace
        fed = [inputs[0], *[None] * (steps - 1)]
        return revflow.measure_memory(lambda: net(fed, state), device="cuda").kept

    stream = on_cuda(1, torch.float32)[0][0][0].nbytes
    assert kept(9, "offloaded") - kept(4, "offloaded") == 5 * stream * 2
    assert kept(9, "kept") - kept(4, "kept") == 5 * stream * (2 + 9)
