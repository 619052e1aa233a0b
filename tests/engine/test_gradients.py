"""Gradients of the engine against ordinary autograd over the same modules, in float64, and against finite differences."""

import pytest
import torch
from torch import nn

import revflow
from engine.nets import (
    STACKS,
    Conditioner,
    additive_two,
    assert_same_gradients,
    image,
    mixed,
    network,
    of_one,
    relative_error,
)

stacks = pytest.mark.parametrize("stack", STACKS, ids=lambda s: s.__name__)


@stacks
def test_equal_plain_autograd(stack):
    net, x = network(stack), image().requires_grad_()
    assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [x])


@stacks
def test_finite_differences(stack):
    net = network(stack)
    x = image(1, 8, 2, 2).requires_grad_()
    parameter = next(net.parameters())

    def function(x, p):
        return torch.func.functional_call(net, {"0.F.first.weight": p}, (x,))

    assert torch.autograd.gradcheck(function, (x, parameter.detach().clone().requires_grad_()), fast_mode=True)


@stacks
def test_streams_as_a_tuple(stack):
    net = network(stack)
    x1, x2 = image(2, 4, 6, 4).requires_grad_(), image(2, 4, 6, 4, seed=2).requires_grad_()
    joined = lambda function: lambda: torch.cat([s.flatten() for s in function((x1, x2))])  # noqa: E731
    assert_same_gradients(net, joined(net), joined(net.plain), [x1, x2])


@stacks
def test_input_without_gradient_in_front_of_parameters(stack):
    net, x = network(stack), image()
    assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [])


@stacks
def test_loss_on_one_stream(stack):
    net = network(stack)
    x1, x2 = image(2, 4, 6, 4).requires_grad_(), image(2, 4, 6, 4, seed=2).requires_grad_()
    for k in (0, 1):
        assert_same_gradients(net, lambda k=k: net((x1, x2))[k], lambda k=k: net.plain((x1, x2))[k], [x1, x2])


@stacks
def test_frozen_parameters_and_blocks(stack):
    net, x = network(stack), image()
    for p in [*net[0].parameters(), *net[-1].F.first.parameters()]:
        p.requires_grad_(False)
    assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [])


def test_frozen_leading_blocks_run_once():
    net, x = network(of_one(lambda: revflow.AdditiveCoupling(Conditioner(4)))), image()
    net[0].requires_grad_(False)
    net(x).sum().backward()
    assert [block.F.calls for block in net] == [1, 2, 2]


def test_partial_gradient_runs_no_block_in_vain():
    net, x = network(of_one(lambda: revflow.AdditiveCoupling(Conditioner(4)))), image().requires_grad_()
    torch.autograd.grad(net(x).sum(), net[2].F.last.weight)
    assert [block.F.calls for block in net] == [1, 1, 2]


def test_everything_frozen_gives_no_graph():
    net = network(mixed).requires_grad_(False)
    assert not net(image()).requires_grad


@stacks
def test_context_tensors_get_gradients(stack):
    net, x = network(stack), image().requires_grad_()
    leaf = image(1, 1, 1, 1, seed=5).requires_grad_()
    assert_same_gradients(net, lambda: net(x, condition=leaf), lambda: net.plain(x, condition=leaf), [x, leaf])
    assert_same_gradients(net, lambda: net(x, condition=leaf * 2), lambda: net.plain(x, condition=leaf * 2), [x, leaf])


def test_context_gradient_through_a_frozen_first_conditioner():
    """y1 = x1 + F(x2, c) needs a gradient for c's sake alone, and G sees y1."""
    net, x, condition = network(of_one(additive_two)), image(), image(1, 1, 1, 1).requires_grad_()
    for block in net:
        block.F.requires_grad_(False)
    net = net[:1]
    run = lambda function: lambda: function(x, condition=condition)  # noqa: E731
    assert_same_gradients(net, run(net), run(net.plain), [condition])


@stacks
def test_retained_graph_and_interleaved_forwards(stack):
    net, x = network(stack, dropout=0.3), image().requires_grad_()
    torch.manual_seed(7)
    first, second = net(x), net(2 * x)
    torch.manual_seed(7)
    expected_first, expected_second = net.plain(x), net.plain(2 * x)
    gradient = lambda y: torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0]  # noqa: E731
    for found, expected in ((first, expected_first), (second, expected_second), (first, expected_first)):
        assert relative_error(gradient(found), gradient(expected)) < 1e-10


def test_second_backward_without_retain_graph_is_pytorchs_error():
    net = network(mixed)
    y = net(image()).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward()


def test_same_block_twice_and_shared_weights():
    torch.manual_seed(0)
    shared = Conditioner(4)
    block = revflow.AdditiveCoupling(shared, shared)
    net = revflow.ReversibleSequence([block, revflow.AdditiveCoupling(shared), block]).double()
    x = image().requires_grad_()
    assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [x])


def test_nested_sequence_runs_twice():
    torch.manual_seed(0)
    inner = Conditioner(2)
    outer = revflow.AdditiveCoupling(revflow.ReversibleSequence([revflow.AdditiveCoupling(inner)]))
    net, x = revflow.ReversibleSequence([outer]).double(), image().requires_grad_()
    net(x).sum().backward()
    assert inner.calls == 2
    assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [x])


def test_parameter_hook_fires_once_on_the_summed_gradient():
    net, x = network(mixed), image()
    weight, seen = net[0].F.first.weight, []
    weight.register_hook(seen.append)
    net(x).sum().backward()
    assert len(seen) == 1 and torch.equal(seen[0], weight.grad)


@pytest.mark.parametrize("change", ["parameter", "output", "context"])
def test_change_in_place_before_backward_is_an_error(change):
    net, condition = network(mixed), image(1, 1, 1, 1)
    y = net(image(), condition=condition)
    loss = y.sum()
    with torch.no_grad():
        {"parameter": net[1].F.last.weight, "output": y, "context": condition}[change].mul_(1.01)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_input_changed_in_place_is_right():
    net, x = network(mixed), image()
    expected = torch.autograd.grad(net.plain(x).square().sum(), net[0].F.first.weight)[0]
    y = net(x)
    x.mul_(2)
    assert relative_error(torch.autograd.grad(y.square().sum(), net[0].F.first.weight)[0], expected) < 1e-10


def test_second_derivative_is_refused():
    net, x = network(mixed), image().requires_grad_()
    (gradient,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated twice.*net.plain\(x\)"):
        gradient.sum().backward()


def test_second_derivative_is_refused_where_the_incoming_gradient_is_a_constant():
    net, x = network(mixed), image().requires_grad_()
    (gradient,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        (gradient.sum() + x.sum()).backward()


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_that_changes_streams_is_refused(hook):
    net = network(mixed)
    getattr(net[1], hook)(lambda module, args, *outputs: tuple(2 * s for s in (outputs[0] if outputs else args)))
    with pytest.raises(RuntimeError, match=r"block 1 \(AffineCoupling\).*hook replaced its"):
        net(image())


def test_a_hook_that_changes_a_stream_in_place_is_refused():
    net = network(mixed)
    net[0].register_forward_hook(lambda module, args, outputs: (outputs[1].mul_(2), None)[1])
    with pytest.raises(RuntimeError, match=r"block 0 \(AdditiveCoupling\).*hook replaced its output"):
        net(image())


@pytest.mark.parametrize("saturation", [-60.0, 60.0])
def test_gated_coupling_with_saturated_gates(saturation):
    """Every gate open or shut: gradients within 1e-5 of plain autograd, nothing infinite."""

    class Saturated(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 8, 3, padding=1)

        def forward(self, x):
            u, h = self.conv(x).chunk(2, 1)
            return u + saturation, h

    torch.manual_seed(0)
    net, x = (
        revflow.ReversibleSequence([revflow.GatedCoupling(Saturated()) for _ in range(8)]),
        image(dtype=torch.float32),
    )
    results = []
    for run in (net, net.plain):
        net.zero_grad()
        run(x).square().sum().backward()
        results.append([p.grad for p in net.parameters()])
    for found, expected in zip(*results, strict=True):
        assert found.isfinite().all()
        assert (found - expected).norm() <= 1e-5 * expected.norm()
