"""What is changed in place between a recurrence's forward and its backward pass: refused, or without effect."""

import pytest
import torch

import revflow
from engine.cells import Cell, along, few_modes, given, loss_of, plainly, recurrence
from engine.nets import assert_close

refused = pytest.raises(RuntimeError, match=r"modified by an inplace operation|has been modified inplace")


@few_modes
@pytest.mark.parametrize("part", ["cells", "memories"])
def test_states_that_were_handed_out(states, part):
    """After the next step has used them: where they are not kept as they are, that step has what it was given."""
    net, (inputs, state) = recurrence(states=states), given(steps=9)
    expected = torch.autograd.grad(loss_of(plainly(net, inputs, state)), list(net.parameters()))
    passed, outputs = [state], []
    for streams in inputs:
        output, state = net.step(streams, passed[-1])
        passed.append(state)
        outputs.append(output)
    loss = loss_of((outputs, state))
    with torch.no_grad():
        getattr(passed[3], part)[-1][0].mul_(2)  # with states=3 one that is kept
    if states in ("kept", 3):
        with refused:
            loss.backward()
    else:
        assert_close(torch.autograd.grad(loss, list(net.parameters())), expected)


@few_modes
def test_a_state_changed_before_the_next_step(states):
    """It is no result of the step before any more."""
    net, (inputs, state) = recurrence(states=states), given(steps=8)
    outputs, last = net(inputs[:4], state)
    with torch.no_grad():
        last.cells[1][0].mul_(2)
    with refused:
        loss_of(net(inputs[4:], last)).backward()
    with pytest.raises(RuntimeError, match="is being modified inplace"):
        outputs[-1][0].mul_(2)


@few_modes
@pytest.mark.parametrize("what", ["an input", "the first state", "the first memory", "an output that is fed back"])
def test_what_a_step_was_given(states, what):
    net, (inputs, state) = recurrence(states=states), given(steps=8)
    inputs[6:] = [None] * 2
    outputs, last = net(inputs, state)
    loss = loss_of((outputs[-1:], last))
    with torch.no_grad():
        {
            "an input": inputs[3][1],
            "the first state": state.cells[2][1],
            "the first memory": state.memories[-1][0],
            "an output that is fed back": outputs[6][0],
        }[what].add_(1)
    with refused:
        loss.backward()


@few_modes
@pytest.mark.parametrize("k", range(3))
def test_parameters_also_of_cells_that_this_pass_does_not_run(states, k):
    # Of one step: through the end of an earlier one all cells lead to all parameters.
    net, (inputs, state) = recurrence(states=states), given(steps=1)
    loss = loss_of(net(inputs, state))
    with torch.no_grad():
        net[k].attention.bias.add_(1)
    with refused:
        torch.autograd.grad(loss, list(net[2].parameters()), retain_graph=True)
    with refused:
        loss.backward()


@few_modes
@pytest.mark.parametrize("needs_grad", [True, False])
def test_context(states, needs_grad):
    net, (inputs, state) = recurrence(states=states), given(steps=8)
    factor = torch.tensor([0.9], dtype=torch.float64, requires_grad=needs_grad)
    loss = loss_of(net(inputs, state, factor=factor))
    with torch.no_grad():
        factor.add_(1)
    with refused:
        torch.autograd.grad(loss, inputs[-1][0])


@few_modes
def test_context_of_a_step_that_this_pass_does_not_run(states):
    """It matters where that step's states are computed again."""
    net, (inputs, state) = recurrence(states=states), given(steps=5)
    factors = [torch.tensor(0.9, dtype=torch.float64) for _ in inputs]
    now = state
    for streams, factor in zip(inputs, factors, strict=True):
        output, now = net.step(streams, now, factor=factor)
    loss = loss_of(([output], now))
    (expected,) = torch.autograd.grad(loss, inputs[-1][0], retain_graph=True)
    factors[3].add_(1)
    if states == 3:
        with refused:
            torch.autograd.grad(loss, inputs[-1][0])
    else:
        assert torch.equal(torch.autograd.grad(loss, inputs[-1][0])[0], expected)


class Overwrites(Cell):
    """Changes one of the tensors that `update` or `mix` is given."""

    def __init__(self, method, argument):
        super().__init__(True, 0.0)
        self.method, self.argument = method, argument

    def update(self, streams, state, memory, context):
        if self.method == "update":
            {"streams": streams, "state": state, "memory": memory}[self.argument][0].mul_(0.5)
        return super().update(streams, state, memory, context)

    def mix(self, streams, state, context):
        if self.method == "mix":
            {"streams": streams, "state": state}[self.argument][0].mul_(0.5)
        return super().mix(streams, state, context)


@few_modes
@pytest.mark.parametrize(
    "method, argument",
    [("update", "streams"), ("update", "state"), ("update", "memory"), ("mix", "streams"), ("mix", "state")],
)
def test_a_cell_that_overwrites_what_it_is_given(states, method, argument):
    """Without gradients too: a first state is seldom trained, and autograd would say nothing."""
    cells = [Cell(True, 0.0), Overwrites(method, argument), Cell(True, 0.0)]
    net, (inputs, state) = revflow.ReversibleRecurrence(cells, states=states).double(), given(steps=2)
    state = revflow.RecurrentState(*(tuple(tuple(t.detach() for t in cell) for cell in part) for part in state))
    with pytest.raises(RuntimeError, match=r"cell 1 \(Overwrites\), .* changed in place"):
        along(net.step, inputs, state)


def test_a_tensor_that_would_get_no_gradient_is_refused():
    net, outsider = recurrence(), torch.ones((), dtype=torch.float64, requires_grad=True)
    mix = net[1].mix
    net[1].mix = lambda *given: tuple(s * outsider for s in mix(*given))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"cell 1 \(Cell\) uses a tensor of shape \(\) that needs a gradient"):
            loss_of(net(*given())).backward()
