"""ReversibleRecurrence: the gradients of ordinary back-propagation through time, and what it is made of and given."""

import copy
import pickle

import pytest
import torch
from torch import nn

import revflow
from engine.cells import (
    CELLS,
    STEPS,
    Cell,
    along,
    both,
    few_modes,
    given,
    loss_of,
    memories,
    modes,
    plainly,
    recurrence,
)
from engine.nets import assert_close


@memories
@pytest.mark.parametrize("fed_back", [False, True], ids=["taught", "fed-back"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@modes
def test_gradients(memory, fed_back, dropout, states):
    inputs, state = given(memory)
    inputs[6:] = [None] * 6 if fed_back else inputs[6:]
    factor = torch.tensor([0.9], dtype=torch.float64, requires_grad=True)
    assert_close(*both(recurrence(memory, dropout, states=states), inputs, state, factor=factor))


def test_nothing_to_feed_back():
    with pytest.raises(ValueError, match=r"inputs\[0\] is None"):
        recurrence()([None], given()[1])


def test_what_a_cell_returns_is_checked():
    net = recurrence()
    update, mix = net[1].update, net[1].mix
    net[1].update = lambda *a: (update(*a)[0][:1], update(*a)[1])
    with pytest.raises(ValueError, match=r"cell 1 \(Cell\), .*update must return state as a tuple of tensors"):
        net(*given())
    net[1].update, net[1].mix = update, lambda *a: [*mix(*a)]
    with pytest.raises(ValueError, match=r"cell 1 .*mix must return streams as a tuple .* got list"):
        net(*given())


def test_cells_and_states_that_do_not_fit():
    with pytest.raises(TypeError, match=r"cell 0 must be a revflow\.RecurrentCell; got a Linear"):
        revflow.ReversibleRecurrence([nn.Linear(2, 2)])
    inputs, state = given()
    with pytest.raises(ValueError, match="of 3 cells; it has 2 states and 3 memories"):
        recurrence()(inputs, state._replace(cells=state.cells[:2]))
    with pytest.raises(TypeError, match=r"state must be a revflow\.RecurrentState; got a tuple"):
        recurrence()(inputs, (state.cells, state.memories))
    with pytest.raises(TypeError, match=r"streams must be a tuple of tensors; got a Tensor"):
        recurrence()([inputs[0][0]], state)
    with pytest.raises(TypeError, match=r"state\.cells\[1\] must be a tuple of tensors; got a Tensor"):
        recurrence()(inputs, state._replace(cells=(state.cells[0], state.cells[1][0], state.cells[2])))
    with pytest.raises(TypeError, match=r"state\.memories\[2\] must be a tuple of tensors; got a list"):
        recurrence()(inputs, state._replace(memories=(*state.memories[:2], [*state.memories[2]])))
    with pytest.raises(ValueError, match="has no cells"):
        recurrence()[3:](inputs, revflow.RecurrentState((), ()))


@few_modes
def test_copies_and_keys(states):
    net, (inputs, state) = recurrence(states=states), given()
    assert list(net.state_dict()) == list(nn.ModuleList(list(net)).state_dict())
    expected = torch.autograd.grad(loss_of(plainly(net, inputs, state)), list(net.parameters()))
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert_close(torch.autograd.grad(loss_of(twin(inputs, state)), list(twin.parameters())), expected)


def test_a_slice_keeps_its_options():
    net, (inputs, state) = recurrence(states=3, guard="off")[1:], given()
    state = revflow.RecurrentState(state.cells[1:], state.memories[1:])
    loss_of(net(inputs, state)).backward()
    assert [cell.calls[0] for cell in net] == [3 * STEPS - STEPS // 3] * 2  # as with states=3
    net[0].update = lambda *a: cell_of_another_result(net[0], *a)
    loss_of(net(inputs, state)).backward()  # the guard is off


def cell_of_another_result(cell, *given):
    new, memory = Cell.update(cell, *given)
    return tuple(2 * t for t in new) if revflow.is_recomputing() else new, memory


@pytest.mark.parametrize("states", [0, -1, True, False, "cpu", "Kept", 2.5, None, [3]], ids=str)
def test_wrong_values_of_states(states):
    possible = r'states must be "kept", "bfloat16", "offloaded", or a number n >= 1 to store every n-th step\'s; got '
    with pytest.raises(ValueError, match=possible):
        recurrence(states=states)


def test_wrong_values_of_guard():
    with pytest.raises(ValueError, match='guard must be "warn", "raise" or "off"; got True'):
        recurrence(guard=True)


@few_modes
@pytest.mark.parametrize("plain", ["no_grad", "ordinary_autograd"])
def test_where_no_backward_pass_is_rebuilt_it_is_the_plain_path(states, plain):
    net, (inputs, state) = recurrence(states=states), given()
    context = torch.no_grad() if plain == "no_grad" else revflow.ordinary_autograd()
    with context:
        found, expected = net(inputs, state), plainly(net, inputs, state)
    assert torch.equal(loss_of(found), loss_of(expected))
    assert [cell.calls for cell in net] == [[2 * STEPS, 2 * STEPS]] * CELLS


@few_modes
def test_transforms_run_the_plain_path(states):
    net, (inputs, state) = recurrence(states=states), given(steps=3)
    parameters = {f"net.{k}": p.detach() for k, p in net.named_parameters()}
    tangents = {k: torch.ones_like(p) for k, p in parameters.items()}
    gradients, derivatives = [], []
    for model in (Along(net, "step"), Along(net, "plain_step")):
        loss = lambda p, model=model: torch.func.functional_call(model, p, (inputs, state))  # noqa: E731
        gradients.append(list(torch.func.grad(loss)(parameters).values()))
        derivatives.append(torch.func.jvp(loss, (parameters,), (tangents,))[1])
    assert_close(*gradients)
    assert torch.equal(*derivatives)


@few_modes
@pytest.mark.parametrize("leaf", [True, False])
def test_functional_call_with_the_backward_after_the_swap(states, leaf):
    """Parameters from elsewhere, as leaves or as results."""
    net, (inputs, state) = recurrence(states=states), given()
    start = {f"net.{k}": (1.1 * p.detach()).requires_grad_() for k, p in net.named_parameters()}
    results = []
    for model in (Along(net, "step"), Along(net, "plain_step")):
        swapped = {k: p if leaf else 1.5 * p for k, p in start.items()}
        loss = torch.func.functional_call(model, swapped, (inputs, state))
        results.append([loss, *torch.autograd.grad(loss, list(start.values()))])
    assert_close(*results)


class Along(nn.Module):
    """The loss over all steps."""

    def __init__(self, net, method):
        super().__init__()
        self.net, self.method = net, method

    def forward(self, inputs, state):
        return loss_of(along(getattr(self.net, self.method), inputs, state))
