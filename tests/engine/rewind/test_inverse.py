"""The inverse: it undoes forward, is differentiable, and is as frugal."""

import pytest
import torch

import revflow
from engine.nets import (
    additive,
    additive_two,
    affine,
    affine_two,
    assert_close,
    assert_same_gradients,
    conditioners,
    evaluations,
    gated,
    gated_two,
    image,
    network,
    plain_inverse,
    relative_error,
    stacks,
    weighted,
)


@stacks
def test_undoes_forward(stack):
    net, x = network(stack), image()
    with torch.no_grad():
        assert relative_error(net.inverse(net(x)), x) < 1e-10
        y = image(*net(x).shape, seed=4)
        assert relative_error(net(net.inverse(y)), y) < 1e-10
        streams = net.inverse(net(x.chunk(2, 1)))
        assert isinstance(streams, tuple) and relative_error(torch.cat(streams, 1), x) < 1e-10


@stacks
@pytest.mark.parametrize("frozen", [0, -1])
def test_with_frozen_parameters(stack, frozen):
    net = network(stack)
    for block in net:
        for p in list(block.parameters())[frozen:][:1]:
            p.requires_grad_(False)
    y = net(image()).detach().requires_grad_()
    assert_same_gradients(net, lambda: net.inverse(y), lambda: plain_inverse(net, y), [y])


@stacks
def test_of_an_output_with_gradients_on(stack):
    net, x = network(stack), image().requires_grad_()
    y = net(x)
    assert relative_error(net.inverse(y), x) < 1e-10
    (gradient,) = torch.autograd.grad(weighted(net.inverse(y)), x)
    assert relative_error(gradient, image(*x.shape, seed=3)) < 1e-10  # that of the identity


@stacks
def test_is_differentiable(stack):
    net = network(stack)
    y = net(image()).detach().requires_grad_()
    assert_same_gradients(net, lambda: net.inverse(y), lambda: plain_inverse(net, y), [y])


@stacks
def test_with_dropout(stack):
    net = network(stack, dropout=0.5)
    y = net(image()).detach().requires_grad_()
    results = []
    for run in (net.inverse, lambda y: plain_inverse(net, y)):
        torch.manual_seed(7)
        first, second = run(y), run(2 * y)
        found = [torch.autograd.grad(weighted(o), [y, *net.parameters()]) for o in (first, second)]
        results.append([first, second, *found[0], *found[1], torch.rand(3).double()])
    assert_close(*results)


@stacks
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_each_conditioner_runs_exactly_twice(stack, direction):
    net = network(stack)
    x = net(image()).detach() if direction == "inverse" else image()
    counts = evaluations(net, lambda: getattr(net, direction)(x).sum().backward())
    assert counts == [[2] * len(conditioners(block)) for block in net]


@stacks
def test_in_the_same_graph_as_forward(stack):
    """An autoencoder with shared weights: the gradient of D(2 E(x)) in x and in every parameter."""
    net, x = network(stack), image().requires_grad_()
    assert_same_gradients(net, lambda: net.inverse(2 * net(x)), lambda: plain_inverse(net, 2 * net.plain(x)), [x])


@stacks
def test_between_two_forwards_of_one_graph(stack):
    net, x = network(stack, dropout=0.3), image().requires_grad_()
    run = lambda: net(net.inverse(net(x) + 1).sin())  # noqa: E731
    plain = lambda: net.plain(plain_inverse(net, net.plain(x) + 1).sin())  # noqa: E731
    assert_same_gradients(net, run, plain, [x])


@stacks
def test_frozen_blocks_at_the_end_are_not_rewound(stack):
    """They are the first ones that the inverse passes."""
    net = network(stack)
    y = net(image()).detach()
    net[1:].requires_grad_(False)
    counts = evaluations(net, lambda: net.inverse(y).sum().backward())
    assert counts == [[2 if k == 0 else 1] * len(conditioners(block)) for k, block in enumerate(net)]
    assert_same_gradients(net, lambda: net.inverse(y), lambda: plain_inverse(net, y), [])


@pytest.mark.parametrize("make", [additive, additive_two, affine, affine_two, gated, gated_two])
def test_memory_is_as_flat_as_forwards(make):
    """What is kept is the output; and a step's peak does not grow with depth but by the parameters' gradients."""

    def of_depth(depth):
        torch.manual_seed(0)
        return revflow.ReversibleSequence([make() for _ in range(depth)], guard="off").double()

    x, peaks = image(), []
    for depth in (4, 16):
        net = of_depth(depth)
        assert revflow.measure_memory(lambda net=net: net.inverse(x)).kept == x.nbytes
        step = revflow.measure_memory(lambda net=net: net.inverse(x).sum().backward())
        peaks.append(step.peak - sum(p.nbytes for p in net.parameters()))
    assert peaks[1] <= peaks[0]
