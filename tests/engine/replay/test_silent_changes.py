"""Networks that change between steps, between the passes of one, and before they are replicated: nothing is believed for ever."""

import copy
from contextlib import nullcontext
from types import MethodType, SimpleNamespace

import pytest
import torch
from torch import nn

import revflow
from engine.against_plain import Body, Cell, Halved, assert_right, chain, frames, squared, through_time


def gated(make, **options):
    torch.manual_seed(6)
    blocks = [revflow.GatedCoupling(Halved(make(8)), Halved(make(8))) for _ in range(2)]
    return revflow.ReversibleSequence(blocks, split_dim=-1, **options).double()


def affine(make, **options):
    return chain(lambda: Halved(make(8)), coupling=revflow.AffineCoupling, **options)


CHAINS = {
    "additive": chain,
    "affine": affine,
    "gated, two": gated,
    "exact": lambda make: gated(make, exact=revflow.Grid(30)),
    "chunks": lambda make: affine(make, chunks=2),
    "budget": lambda make: chain(make, memory_budget="1kB"),
}
chains = pytest.mark.parametrize("kind", CHAINS)
no_budget_warning = pytest.mark.filterwarnings("ignore:memory_budget")


def trained(kind, make=Body, steps=3):
    net, x = CHAINS[kind](make), frames()
    for _ in range(steps):
        net(x).square().sum().backward()
    return net, x


class Wider(nn.Module):
    """Another body with other parameters, and dropout."""

    def __init__(self, outputs=4):
        super().__init__()
        self.first, self.last = nn.Linear(4, 9, bias=False), nn.Linear(9, outputs)

    def forward(self, x):
        return self.last(nn.functional.dropout(torch.sin(self.first(x)), 0.5, self.training))


def replaced(block, make):
    new = block.F.body.last.out_features if isinstance(block.F, Halved) else 4
    block.F = (Halved(make(new)) if isinstance(block.F, Halved) else make(new)).double()


@chains
@no_budget_warning
def test_a_conditioner_that_is_replaced_again_and_again(kind):
    net, x = trained(kind)
    for make in (Wider, Body, nn.Identity if kind in ("additive", "budget") else Wider):
        replaced(net[1], lambda outputs, make=make: make(outputs))
        assert_right(net, squared(x), [x], steps=2, tolerance=1e-7)


@chains
@no_budget_warning
def test_a_block_that_is_replaced_inserted_and_removed(kind):
    net, x = trained(kind)
    net[0] = revflow.AdditiveCoupling(Wider(), Wider()).double()
    assert_right(net, squared(x), [x], tolerance=1e-7)
    net.append(revflow.AffineCoupling(Halved(Wider(8))).double())
    assert_right(net, squared(x), [x], tolerance=1e-7)
    del net[1]
    assert_right(net, squared(x), [x], tolerance=1e-7)


@chains
@no_budget_warning
def test_parameters_that_are_replaced_tied_frozen_and_converted(kind):
    net, x = trained(kind)
    bodies = [m for m in net.modules() if isinstance(m, Body)]
    bodies[0].first.weight = nn.Parameter(torch.randn(6, 4, dtype=torch.float64) / 4)
    assert_right(net, squared(x), [x], tolerance=1e-7)
    bodies[0].first.weight = bodies[-1].first.weight
    assert_right(net, squared(x), [x], tolerance=1e-7)
    bodies[-1].requires_grad_(False)
    assert_right(net, squared(x), [x], tolerance=1e-7)
    bodies[-1].requires_grad_(True)
    bodies[0].first.bias = None
    assert_right(net, squared(x), [x], tolerance=1e-7)


@chains
@no_budget_warning
def test_a_forward_that_is_patched(kind):
    net, x = trained(kind)
    target = next(m for m in net.modules() if isinstance(m, Body))
    target.forward = MethodType(lambda self, x: self.last(self.first(x).square()), target)
    found = []
    for plain in (False, True):
        net.zero_grad()
        with revflow.ordinary_autograd() if plain else nullcontext():
            loss = net(x).square().sum()
        loss.backward()
        found.append([p.grad for p in net.parameters()])
    for f, e in zip(*found, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-7, atol=1e-7)


@chains
@pytest.mark.parametrize("change", ["replace", "freeze", "unfreeze", "eval"])
@no_budget_warning
def test_a_change_between_the_passes(kind, change):
    net, x = trained(kind)
    net.zero_grad()
    if change == "unfreeze":
        net[1].requires_grad_(False)
    twin, found = copy.deepcopy(net), []
    for model in (net, twin):
        x.grad = None
        parameters = list(model.parameters())
        with revflow.ordinary_autograd() if model is twin else nullcontext():
            loss = model(x).square().sum()
        if change == "replace":
            replaced(model[1], Body)
        elif change == "eval":
            model.eval()
        else:
            model[1].requires_grad_(change == "unfreeze")
        loss.backward()
        found.append([x.grad, *(p.grad for p in parameters)])
    for f, e in zip(*found, strict=True):
        assert (f is None) == (e is None)
        if e is not None:
            torch.testing.assert_close(f, e, rtol=1e-7, atol=1e-7)


class Tied(Body):
    """Reads a weight of another module, to which a holder leads that is not a module."""

    def __init__(self, hold, read, outputs=4):
        super().__init__(outputs)
        self.held, self.read = hold, read

    def forward(self, x):
        return super().forward(x @ self.read(self.held))


HOLDERS = {
    "a tuple": (lambda other: (other,), lambda held: held[0].weight, r"held\[0\]\.weight"),
    "a namespace": (lambda other: SimpleNamespace(w=other.weight), lambda held: held.w, r"held\.w"),
    "a dictionary": (lambda other: {"o": [other]}, lambda held: held["o"][0].weight, r"held\['o'\]\[0\]\.weight"),
}


@chains
@pytest.mark.parametrize("holder", HOLDERS)
@no_budget_warning
def test_a_tied_weight_that_is_unfrozen_frozen_and_unfrozen_again(holder, kind):
    hold, read, place = HOLDERS[holder]
    other = nn.Linear(4, 4).double().requires_grad_(False)
    net, x = trained(kind, lambda outputs=4: Tied(hold(other), read, outputs))
    for _ in range(2):
        other.requires_grad_(True)
        with pytest.raises(RuntimeError, match=rf"block \d .*shape \(4, 4\) \(.*{place}\).*Register it, or pass it"):
            net(x).sum().backward()
        with revflow.ordinary_autograd():
            loss = net(x).square().sum()
        loss.backward()
        assert other.weight.grad.abs().sum() > 0
        other.requires_grad_(False)
        assert_right(net, squared(x), [x], steps=2, tolerance=1e-7)


def test_registering_the_weight_is_the_remedy():
    other = nn.Linear(4, 4).double()
    hold, read, _ = HOLDERS["a tuple"]
    net, x = chain(lambda: Tied(hold(other), read)), frames()
    for block in net:
        block.F.registered = other
    assert_right(net, squared(x), [x], steps=2)


@pytest.mark.parametrize("states", ["kept", 2, "offloaded"])
@pytest.mark.parametrize("holder", HOLDERS)
def test_a_cell_with_a_tied_weight_that_is_unfrozen_later(holder, states):
    hold, read, place = HOLDERS[holder]
    other = nn.Linear(4, 4).double().requires_grad_(False)
    cells = [Cell(Body()), Cell(Tied(hold(other), read))]
    net, loss_of = revflow.ReversibleRecurrence(cells, states=states).double(), through_time()
    assert_right(net, loss_of, steps=3)
    other.requires_grad_(True)
    with pytest.raises(RuntimeError, match=rf"cell 1.*\(.*{place}\).*Register it"):
        loss_of(net).backward()
    net[1] = Cell(Wider()).double()
    assert_right(net, loss_of, steps=2)


def replicated(module, done=None):
    """As torch.nn.parallel.replicate does it, whose broadcast needs GPUs: parameters become results of an operation."""
    done = {} if done is None else done
    if module not in done:
        twin = done[module] = module._replicate_for_data_parallel()
        for name, child in module._modules.items():
            twin._modules[name] = child if child is None else replicated(child, done)
        for name, parameter in module._parameters.items():
            twin.__dict__[name] = None if parameter is None else parameter.view_as(parameter)
    return done[module]


class Model(nn.Module):
    def __init__(self, sequence):
        super().__init__()
        self.enter, self.sequence = nn.Linear(8, 8).double(), sequence

    def forward(self, x):
        return self.sequence(self.enter(x))


NAMED = r"ReversibleSequence is a replica of torch\.nn\.DataParallel.*no gradient: use DistributedDataParallel"


@chains
@pytest.mark.parametrize("steps", [0, 3])
@no_budget_warning
def test_replicas_are_refused_by_name_and_right_under_standard_autograd(kind, steps):
    net, x = trained(kind, steps=steps)
    model = Model(net)
    with pytest.raises(RuntimeError, match=NAMED):
        replicated(model)(x)
    with revflow.ordinary_autograd():
        loss = sum(replicated(model)(part).square().sum() for part in x.chunk(2))
        expected = torch.autograd.grad(loss, list(model.parameters()))
        found = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-7, atol=1e-7)
    assert_right(model, squared(x), [x], tolerance=1e-7)  # the network itself goes on


def test_inverse_log_determinant_and_parts_of_replicas():
    net, x = affine(Body), frames()
    for call in (lambda r: r.inverse(x), lambda r: r.forward_with_log_det(x)):
        with pytest.raises(RuntimeError, match=NAMED):
            call(replicated(net))
    with pytest.raises(RuntimeError, match=r"block \d .*needs a gradient.*it would get none"):
        replicated(net)[1:](x).sum().backward()


def test_a_replica_of_a_recurrence_after_steps():
    net, loss_of = revflow.ReversibleRecurrence([Cell(Body()), Cell(Body())]).double(), through_time()
    loss_of(net).backward()
    with pytest.raises(RuntimeError, match=r"ReversibleRecurrence is a replica of torch\.nn\.DataParallel"):
        loss_of(replicated(net))
    assert_right(net, loss_of)
