"""Hooks of parameters run once, on the whole gradient, whatever is saved where."""

import copy

import pytest
import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import revflow
from engine.against_plain import Body, Cell, Halved, assert_right, chain, frames, recurrence, squared, through_time


def packed(t):
    return [t.clone()]


WAYS = {
    "nothing": lambda net, x: net(x),
    "save_on_cpu": lambda net, x: within(save_on_cpu(), net, x),
    "copies": lambda net, x: within(saved_tensors_hooks(packed, lambda held: held[0]), net, x),
    "checkpoint": lambda net, x: checkpoint(net, x, use_reentrant=False),
    "checkpoint in checkpoint": lambda net, x: checkpoint(
        lambda x: checkpoint(net, x, use_reentrant=False), x, use_reentrant=False
    ),
}
ways = pytest.mark.parametrize("way", WAYS)


def within(context, net, x):
    with context:
        return net(x)


def hooked(net):
    calls = []
    for p in net.parameters():
        p.register_hook(lambda g: calls.append(1) or 2 * g.clamp(-1, 1))
    return calls


NETS = {
    "additive": lambda: chain(Body),
    "affine": lambda: chain(lambda: Halved(Body(8)), coupling=revflow.AffineCoupling),
    "gated": lambda: chain(lambda: Halved(Body(8)), coupling=revflow.GatedCoupling),
    "exact": lambda: chain(Body, exact=revflow.Grid(30)),
    "chunks": lambda: chain(Body, chunks=2),
}


@ways
@pytest.mark.parametrize("kind", NETS)
def test_each_hook_runs_once_on_the_whole_gradient(kind, way):
    net, x = NETS[kind](), frames()
    twin = copy.deepcopy(net)
    calls, expected_calls = hooked(net), hooked(twin)
    WAYS[way](net, x).square().sum().backward()
    twin.plain(x).square().sum().backward()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9)
    assert len(calls) == len(expected_calls)


@ways
def test_tied_weights(way):
    body, x = Body(), frames()
    net = chain(lambda: body)
    twin = copy.deepcopy(net)
    hooked(net), hooked(twin)
    WAYS[way](net, x).square().sum().backward()
    twin.plain(x).square().sum().backward()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9)


def test_a_hook_that_was_removed_does_not_run():
    net, x, calls = chain(Body), frames(), []
    handles = [p.register_hook(lambda g: calls.append(1)) for p in net.parameters()]
    net(x).sum().backward()
    assert len(calls) == len(handles)
    for handle in handles:
        handle.remove()
    net(x).sum().backward()
    assert len(calls) == len(handles)


@pytest.mark.parametrize("states", ["kept", 2])
def test_recurrence(states):
    net, calls = recurrence(Body, states), []
    for p in net.parameters():
        p.register_hook(lambda g: calls.append(1) or 2 * g)
    loss_of = through_time()
    with save_on_cpu():
        loss = loss_of(net)
    loss.backward()
    found = [p.grad for p in net.parameters()]
    assert len(calls) == len(found)
    net.zero_grad()
    with revflow.ordinary_autograd():
        loss_of(net).backward()
    for f, p in zip(found, net.parameters(), strict=True):
        torch.testing.assert_close(f, p.grad, rtol=1e-9, atol=1e-9)


def test_hooks_of_an_inner_tensor_are_the_conditioners_own():
    class Doubling(Body):
        def forward(self, x):
            hidden = torch.tanh(self.first(x))
            if hidden.requires_grad:
                hidden.register_hook(lambda g: 2 * g)
            return self.last(hidden)

    x = frames()
    assert_right(chain(Doubling), squared(x), [x])


@pytest.mark.parametrize("kind", ["additive", "affine", "exact"])
def test_a_hook_that_a_conditioner_registers_at_every_call(kind):
    class Scaling(Body):
        def forward(self, x):
            if self.last.weight.requires_grad:
                self.last.weight.register_hook(lambda g: 2 * g)
            return super().forward(x)

    x = frames()
    net = {
        "additive": lambda: chain(Scaling),
        "affine": lambda: chain(lambda: Halved(Scaling(8)), coupling=revflow.AffineCoupling),
        "exact": lambda: chain(Scaling, exact=revflow.Grid(30)),
    }[kind]()
    assert_right(net, squared(x), [x])


@pytest.mark.parametrize("states", ["kept", 2])
@pytest.mark.parametrize("method", ["update", "mix"])
def test_a_hook_that_a_cell_registers_on_its_streams(method, states):
    class Hooking(Cell):
        def update(self, streams, state, memory, context):
            if method == "update":
                double(*streams)
            return super().update(streams, state, memory, context)

        def mix(self, streams, state, context):
            if method == "mix":
                double(*streams)
            return super().mix(streams, state, context)

    def double(*tensors):
        for tensor in tensors:
            if tensor.requires_grad:
                tensor.register_hook(lambda g: 2 * g)

    torch.manual_seed(1)
    net = revflow.ReversibleRecurrence([Hooking(Body()) for _ in range(2)], states=states).double()
    assert_right(net, through_time(), steps=2)


def doubled(tensors):
    for tensor in tensors:
        if tensor.requires_grad:
            tensor.register_hook(lambda g: 2 * g)
    return tensors


def test_a_hook_that_a_cell_registers_on_its_new_state():
    class Hooking(Cell):
        def mix(self, streams, state, context):
            return super().mix(streams, doubled(state), context)

    torch.manual_seed(1)
    net = revflow.ReversibleRecurrence([Hooking(Body()) for _ in range(2)]).double()
    assert_right(net, through_time(), steps=2)


def test_a_hook_that_a_cell_registers_on_its_old_state_is_refused():
    class Hooking(Cell):
        def update(self, streams, state, memory, context):
            return super().update(streams, doubled(state), memory, context)

    net = revflow.ReversibleRecurrence([Hooking(Body()) for _ in range(2)]).double()
    with pytest.raises(RuntimeError, match=r"cell 0 .*registers a hook on a state.*on a tensor that the cell computes"):
        through_time()(net)
