"""ReversibleRecurrence: the gradients of ordinary back-propagation through time, and no more kept than states and inputs."""

import copy
import gc
import itertools

import pytest
import torch
from torch import Tensor, nn

import revflow
from engine.nets import assert_close

STEPS, CELLS, SHAPE = 12, 3, (2, 3, 4, 4)


class Cell(revflow.RecurrentCell):
    """A convolutional LSTM that gates one of two streams, with or without a memory, and an optional factor."""

    def __init__(self, memory: bool, dropout: float) -> None:
        super().__init__()
        self.gates = nn.Conv2d(9 if memory else 6, 15 if memory else 12, 3, padding=1)
        self.attention = nn.Conv2d(3, 3, 1)
        self.dropout = nn.Dropout(dropout)
        self.calls = [0, 0]

    def update(self, streams, state, memory, context):
        self.calls[0] += 1
        h, c = state
        i, f, g, o, *m = self.gates(torch.cat((streams[0], h, *memory), 1)).split(3, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(self.dropout(g))
        c = c * context.get("factor", 1.0)
        return (torch.sigmoid(o) * torch.tanh(c), c), tuple(
            torch.tanh(new) + old for new, old in zip(m, memory, strict=True)
        )

    def mix(self, streams, state, context):
        self.calls[1] += 1
        x1, x2 = streams
        return revflow.GatedCoupling.combine(x2, self.dropout(self.attention(state[0])), state[0]), x1


def recurrence(
    memory: bool = True, dropout: float = 0.0, dtype: torch.dtype = torch.float64, gate: float = 0.0, **options
):
    torch.manual_seed(0)
    net = revflow.ReversibleRecurrence((Cell(memory, dropout) for _ in range(CELLS)), **options).to(dtype)
    for cell in net:
        nn.init.constant_(cell.attention.bias, gate)
    return net


def values(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*SHAPE, dtype=dtype, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def given(memory: bool = True, steps: int = STEPS, dtype: torch.dtype = torch.float64):
    """The inputs of all steps, and a state."""
    inputs = [(values(2 * t, dtype), values(2 * t + 1, dtype)) for t in range(steps)]
    cells = tuple((values(50 + 2 * k, dtype), values(51 + 2 * k, dtype)) for k in range(CELLS))
    memories = tuple((values(90 + k, dtype),) if memory else () for k in range(CELLS))
    return inputs, revflow.RecurrentState(cells, memories)


def plainly(net, inputs, state, **context):
    outputs = []
    for streams in inputs:
        output, state = net.plain_step(outputs[-1] if streams is None else streams, state, **context)
        outputs.append(output)
    return outputs, state


def loss_of(result, first: int = 0) -> Tensor:
    """Of the outputs from step `first` on and of the final state; every value weighs differently."""
    outputs, state = result
    tensors = [*itertools.chain(*outputs[first:], *state.cells, *state.memories[-1:])]
    return sum(
        (t * torch.linspace(-1, 2 + k, t.numel(), dtype=t.dtype).view_as(t)).sum() for k, t in enumerate(tensors)
    )


def both(net, inputs, state, first=0, wanted=None, **context):
    """Loss and gradients with the engine, and by ordinary autograd."""
    tensors = [t for pair in inputs if pair is not None for t in pair]
    tensors += [*itertools.chain(*state.cells, *state.memories[-1:]), *context.values()]
    wanted = [*tensors, *(p for p in net.parameters() if p.requires_grad)] if wanted is None else wanted
    results = []
    for run in (net, lambda *a, **k: plainly(net, *a, **k)):
        torch.manual_seed(7)
        loss = loss_of(run(inputs, state, **context), first)
        results.append([loss, *torch.autograd.grad(loss, wanted, allow_unused=True)])
    return results


memories = pytest.mark.parametrize("memory", [False, True], ids=["", "memory"])


@memories
@pytest.mark.parametrize("fed_back", [False, True], ids=["taught", "fed-back"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("states", ["kept", "bfloat16", "offloaded", 1, 3, 5, 100])
def test_gradients(memory, fed_back, dropout, states):
    inputs, state = given(memory)
    inputs[6:] = [None] * 6 if fed_back else inputs[6:]
    factor = torch.tensor([0.9], dtype=torch.float64, requires_grad=True)
    assert_close(*both(recurrence(memory, dropout, states=states), inputs, state, factor=factor))


@memories
@pytest.mark.parametrize("gate", [0.0, 12.0, 17.0])
def test_gradients_in_float32_with_saturated_gates(memory, gate):
    inputs, state = given(memory, dtype=torch.float32)
    net = recurrence(memory, dtype=torch.float32, gate=gate)
    assert_close(*both(net, inputs, state), tolerance=1e-5)


def test_a_loss_on_the_last_step_alone():
    assert_close(*both(recurrence(), *given(), first=STEPS - 1))


def test_frozen_cells_and_inputs_without_gradient():
    net, (inputs, state) = recurrence(), given()
    net[0].requires_grad_(False)
    inputs = [(a.detach(), b.detach()) for a, b in inputs]
    assert_close(*both(net, inputs, state, wanted=[p for cell in net[1:] for p in cell.parameters()]))


@pytest.mark.parametrize("k", range(CELLS))
def test_the_gradients_of_one_cell_alone(k):
    net = recurrence()
    assert_close(*both(net, *given(), wanted=list(net[k].parameters())))


def test_updates_run_twice_and_mixes_three_times():
    net = recurrence()
    loss_of(net(*given())).backward()
    # The last cell's mix is not replayed: no cell needs its output.
    assert [cell.calls for cell in net] == [[2 * STEPS, 3 * STEPS]] * (CELLS - 1) + [[2 * STEPS, 2 * STEPS]]


@memories
def test_a_step_keeps_its_input_and_its_states(memory):
    def kept(steps):
        inputs, state = given(memory, steps)
        fed = [inputs[0], *[None] * (steps - 1)]
        return revflow.measure_memory(lambda: net(fed, state)).kept

    net = recurrence(memory, guard="off")
    stream = values(0).nbytes
    # x1 passes a cell as it is: of the two streams that are fed back, both are new after three cells.
    assert kept(9) - kept(4) == 5 * stream * (2 + CELLS * (3 if memory else 2))


def alive():
    """Steps that somebody still refers to."""
    return [o for o in gc.get_objects() if type(o) is revflow._steps.Step]


def passes():
    """What backward passes have laid aside, and somebody still holds."""
    return [o for o in gc.get_objects() if type(o) is revflow._backward.Pass]


def test_nothing_stays_behind():
    gc.collect()
    net, (inputs, state) = recurrence(), given()
    loss = loss_of(net(inputs, state))
    gc.disable()
    try:
        for parameter in net[1].parameters():
            torch.autograd.grad(loss, parameter, retain_graph=True)
        steps = alive()
        assert len(steps) == STEPS and not passes()
        del loss, steps
        assert not alive()
    finally:
        gc.enable()


def test_two_backwards_over_one_graph():
    net = recurrence(dropout=0.3)
    loss = loss_of(net(*given()))
    first = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, list(net.parameters()))))
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_an_exception_in_the_rerun_and_a_retry():
    gc.collect()
    net, (inputs, state) = recurrence(), given()
    loss = loss_of(net(inputs, state))
    update = net[1].update
    net[1].update = lambda *a: 1 / 0
    with pytest.raises(ZeroDivisionError):
        loss.backward(retain_graph=True)
    assert len(alive()) == STEPS and not passes()
    net[1].update = update
    net.zero_grad()
    found = torch.autograd.grad(loss, list(net.parameters()))
    assert_close(found, torch.autograd.grad(loss_of(plainly(net, inputs, state)), list(net.parameters())))


def test_what_was_kept_may_not_change():
    net, (inputs, state) = recurrence(), given()
    outputs, last = net(inputs, state)
    loss = loss_of((outputs, last))
    with torch.no_grad():
        last.cells[0][0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_parameters_may_not_change():
    net = recurrence()
    loss = loss_of(net(*given()))
    with torch.no_grad():
        next(net.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_second_derivatives_are_refused():
    net = recurrence()
    (gradient,) = torch.autograd.grad(loss_of(net(*given())), next(net.parameters()), create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        gradient.sum().backward()


def test_without_gradients_it_is_the_plain_path():
    net, (inputs, state) = recurrence(), given()
    with torch.no_grad():
        found, expected = net(inputs, state), plainly(net, inputs, state)
    assert torch.equal(loss_of(found), loss_of(expected))
    assert [cell.calls for cell in net] == [[2 * STEPS, 2 * STEPS]] * CELLS


def test_autocast_outside_of_the_backward_pass():
    net, (inputs, state) = recurrence(dtype=torch.float32), given(dtype=torch.float32)
    results = []
    for run in (net, lambda *a: plainly(net, *a)):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            loss = loss_of(run(inputs, state))
        results.append(torch.autograd.grad(loss, list(net.parameters())))
    assert_close(*results, tolerance=1e-6)


def test_copies_and_keys():
    net = recurrence()
    assert list(net.state_dict()) == list(nn.ModuleList(list(net)).state_dict())
    assert torch.equal(loss_of(copy.deepcopy(net)(*given())), loss_of(net(*given())))


def test_nothing_to_feed_back():
    with pytest.raises(ValueError, match=r"inputs\[0\] is None"):
        recurrence()([None], given()[1])


def test_a_tensor_that_would_get_no_gradient_is_refused():
    net, outsider = recurrence(), torch.ones((), dtype=torch.float64, requires_grad=True)
    mix = net[1].mix
    net[1].mix = lambda *given: tuple(s * outsider for s in mix(*given))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"cell 1 \(Cell\) uses a tensor of shape \(\) that needs a gradient"):
            loss_of(net(*given())).backward()


def test_streams_changed_in_place_are_refused():
    net = recurrence()
    update = net[2].update
    net[2].update = lambda streams, *rest: update((streams[0].mul_(2), streams[1]), *rest)
    with pytest.raises(RuntimeError, match=r"cell 2 \(Cell\), .* changed in place"):
        net(*given())


def test_what_a_cell_returns_is_checked():
    net = recurrence()
    update, mix = net[1].update, net[1].mix
    net[1].update = lambda *a: (update(*a)[0][:1], update(*a)[1])
    with pytest.raises(ValueError, match=r"cell 1 \(Cell\), .*update has to return state as a tuple of tensors"):
        net(*given())
    net[1].update, net[1].mix = update, lambda *a: [*mix(*a)]
    with pytest.raises(ValueError, match=r"cell 1 .*mix has to return streams as a tuple .* got list"):
        net(*given())


def test_cells_and_states_that_do_not_fit():
    with pytest.raises(TypeError, match=r"cell 0 has to be a revflow\.RecurrentCell; got a Linear"):
        revflow.ReversibleRecurrence([nn.Linear(2, 2)])
    inputs, state = given()
    with pytest.raises(ValueError, match="of 3 cells; it holds 2 states and 3 memories"):
        recurrence()(inputs, state._replace(cells=state.cells[:2]))
