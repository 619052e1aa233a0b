"""Keyword arguments of a call: they reach every conditioner, and the tensors among them get gradients."""

from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn

import revflow
from engine.nets import assert_close, conditioners, couplings, image, network, plain_inverse, stacks, weighted

Pair = namedtuple("Pair", ["scale", "shift"])


def of_one_channel(seed):
    return image(1, 1, 1, 1, seed=seed).requires_grad_()


def same_gradients(net, wanted, make_context, x):
    """In both directions: through a context made anew for each call."""
    for run, plain in ((net, net.plain), (net.inverse, lambda y, **context: plain_inverse(net, y, **context))):
        results = []
        for function in (run, plain):
            y = function(x, **make_context())
            found = torch.autograd.grad(weighted(y), [*wanted, *net.parameters()], allow_unused=True)
            results.append([y, *found])
        assert_close(*results)
        x = y.detach().requires_grad_()
        wanted = [x, *wanted[1:]]


@stacks
@pytest.mark.parametrize("kind", ["leaf", "not a leaf", "without gradient", "None", "absent", "an input too"])
def test_a_tensor(stack, kind):
    net, x, leaf = network(stack), image().requires_grad_(), of_one_channel(5)
    context = {
        "leaf": lambda: {"condition": leaf},
        "not a leaf": lambda: {"condition": leaf.sin()},
        "without gradient": lambda: {"condition": leaf.detach()},
        "None": lambda: {"condition": None},
        "absent": dict,
        "an input too": lambda: {"condition": x.mean((1, 2, 3), keepdim=True)},
    }[kind]
    same_gradients(net, [x, leaf] if "leaf" in kind else [x], context, x)


class Reading(nn.Module):
    """Has `conditioner` use what `read` finds in the keyword arguments."""

    def __init__(self, conditioner, read):
        super().__init__()
        self.conditioner, self.read = conditioner, read

    def forward(self, x, **context):
        return self.conditioner(x, condition=self.read(**context))


TREES = {
    "tuple, list, None": (lambda a, b: {"c": (a, [b, 2], None)}, lambda c: c[0] * c[1][0] * c[1][1]),
    "dictionaries": (
        lambda a, b: {"c": {"a": a, "more": OrderedDict(pair=Pair(a, b))}},  # one of them twice
        lambda c: c["a"] * c["more"]["pair"].scale + c["more"]["pair"].shift,
    ),
    "non-tensors": (
        lambda a, b: {"a": a, "b": b, "name": "sin", "power": 2, "flag": True, "function": torch.sin},
        lambda a, b, name, power, flag, function: getattr(a, name)() * function(b) ** power if flag else None,
    ),
    "integers, one not used": (
        lambda a, b: {"c": (a, b, torch.tensor([2, 3]))},
        lambda c: c[0] ** c[2][1],
    ),
}


@stacks
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("leaf", [True, False])
def test_trees(stack, tree, leaf):
    net, x, make, read = network(stack), image().requires_grad_(), *TREES[tree]
    for block in net:
        for name in ("F", "G"):
            if getattr(block, name, None) is not None:
                setattr(block, name, Reading(getattr(block, name), read))
    a, b = of_one_channel(5), of_one_channel(6)
    same_gradients(net, [x, a, b], lambda: make(a, b) if leaf else make(a.exp(), b.exp()), x)


@couplings
def test_gradient_through_a_frozen_first_conditioner(make):
    """With two conditioners, the first needs a gradient for the context's sake alone, and the second sees what it gave."""
    torch.manual_seed(0)
    net, x, condition = revflow.ReversibleSequence([make()]).double(), image(), of_one_channel(5)
    net[0].F.requires_grad_(False)
    results = []
    for function in (net, net.plain):
        results.append(torch.autograd.grad(weighted(function(x, condition=condition)), condition))
    assert_close(*results)


@stacks
def test_the_context_alone_needs_a_gradient(stack):
    net, x, condition = network(stack).requires_grad_(False), image(), of_one_channel(5)
    found, expected = (torch.autograd.grad(weighted(f(x, condition=condition)), condition) for f in (net, net.plain))
    assert_close(found, expected)


@stacks
def test_a_parameter_as_context(stack):
    """Its gradient is the sum of both uses."""
    net, x = network(stack), image().requires_grad_()
    scale = nn.Parameter(image(1, 6, 1, 1))
    for c in conditioners(net):
        c.norm.scale = scale
        c.norm.register_forward_hook(lambda m, args, out: out * m.scale)
    same_gradients(net, [x], lambda: {"condition": scale}, x)


@stacks
def test_a_hook_on_a_context_tensor_fires_once(stack):
    net, leaf, results = network(stack), of_one_channel(5), []
    for function in (net, net.plain):
        seen = []
        hook = leaf.register_hook(lambda g, seen=seen: (seen.append(g), 2 * g)[1])
        leaf.grad = None
        weighted(function(image(), condition=leaf)).backward()
        hook.remove()
        assert len(seen) == 1
        results.append([*seen, leaf.grad])
    assert_close(*results)


@stacks
def test_the_callers_containers_stay_as_they_are(stack):
    net, condition = network(stack), of_one_channel(5)
    given, seen = {"a": [condition, None]}, []
    for block in net:
        if isinstance(block, revflow.Coupling):
            block.F = Reading(block.F, lambda c: (seen.append(c), c["a"][0])[1])
            if block.G is not None:
                block.G = Reading(block.G, lambda c: (seen.append(c), c["a"][0])[1])
    net(image(), c=given).sum().backward()
    assert given == {"a": [condition, None]} and given["a"][0] is condition
    assert len(seen) == 2 * len(conditioners(net))
    assert all(torch.equal(c["a"][0], condition) and c["a"][1] is None for c in seen)


def test_a_block_of_your_own_gets_the_context():
    """Forward and inverse, in both runs."""

    class Shift(revflow.Bijection):
        def forward(self, *streams, by):
            return tuple(s + by for s in streams)

        def inverse(self, *streams, by):
            return tuple(s - by for s in streams)

    net, x, by = revflow.ReversibleSequence([Shift(), Shift()]), image().requires_grad_(), of_one_channel(5)
    found, expected = (torch.autograd.grad(weighted(f(x, by=by)), [x, by]) for f in (net, net.plain))
    assert_close(found, expected)


@pytest.mark.parametrize("through", ["closure", "object", "graph"])
@couplings
def test_a_tensor_that_the_engine_cannot_see_is_refused(make, through):
    """It would get no gradient, in silence."""
    weight = image(1, 1, 1, 1, seed=5).requires_grad_()

    class Holder:
        value = weight * 2 if through == "graph" else weight

    class Peeking(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x, holder=None):
            return self.inner(x * (Holder if holder is None else holder).value)

    block = make()
    block.F = Peeking(block.F)
    if block.G is not None:
        block.G = Peeking(block.G)
    net, x = revflow.ReversibleSequence([block]).double(), image()
    y = net(x, holder=Holder()) if through == "object" else net(x)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"block 0 .*tensor of shape \(1, 1, 1, 1\).*would get none"):
            y.sum().backward(retain_graph=True)
    with torch.no_grad():
        net(x)
