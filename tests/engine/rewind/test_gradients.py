"""Gradients of the engine against ordinary autograd over the same modules, in float64, and against finite differences."""

from itertools import combinations_with_replacement

import pytest
import torch
from torch import nn

import revflow
from engine.nets import (
    additive,
    assert_close,
    assert_same_gradients,
    conditioners,
    evaluations,
    gated,
    gated_two,
    image,
    network,
    stacks,
    weighted,
)


def twice(net):
    """The evaluations of a whole training step."""
    return [[2] * len(conditioners(block)) for block in net]


def streams(*needs_grad):
    return tuple(image(2, 4, 6, 4, seed=k + 1).requires_grad_(need) for k, need in enumerate(needs_grad))


def joined(function, *arguments):
    """For sequences called with a tuple of streams."""
    return lambda: torch.cat([s.flatten() for s in function(*arguments)])


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
def test_between_trainable_modules(stack):
    """The input is no leaf, and the output feeds something trainable."""
    net, x = network(stack), image(2, 3, 6, 4).requires_grad_()
    model = nn.ModuleList([nn.Conv2d(3, 8, 1), net, nn.LazyConv2d(2, 1)]).double()
    assert_same_gradients(model, lambda: model[2](net(model[0](x))), lambda: model[2](net.plain(model[0](x))), [x])


@stacks
@pytest.mark.parametrize("frozen", [False, True])
def test_input_without_gradient_and_a_trainable_tail(stack, frozen):
    """Where the sequence is frozen, the tail trains and nothing runs again."""
    net, x = network(stack).requires_grad_(not frozen), image()
    model = nn.ModuleList([net, nn.LazyConv2d(2, 1)]).double()
    counts = evaluations(net, lambda: model[1](net(x)).sum().backward())
    assert counts == ([[1] * len(c) for c in twice(net)] if frozen else twice(net))
    assert_same_gradients(model, lambda: model[1](net(x)), lambda: model[1](net.plain(x)), [])


@stacks
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)])
def test_streams_as_a_tuple(stack, needs):
    net, x = network(stack), streams(*needs)
    assert_same_gradients(net, joined(net, x), joined(net.plain, x), [s for s in x if s.requires_grad])


@stacks
def test_one_tensor_as_both_streams(stack):
    net, x = network(stack), streams(True)[0]
    assert_same_gradients(net, joined(net, (x, x)), joined(net.plain, (x, x)), [x])


@stacks
def test_loss_on_one_stream(stack):
    """Of the last block alone, too: where the stream does not depend on a conditioner, the gradient is None."""
    net, x = network(stack), streams(True, True)
    for part in (net, net[:1]):
        for k in (0, 1):
            run, plain = (lambda f=f, k=k: f(x)[k] for f in (part, part.plain))
            assert_same_gradients(part, run, plain, list(x))


@stacks
def test_parameters_that_are_not_used_get_none(stack):
    net, x = network(stack), image()
    for conditioner in conditioners(net):
        conditioner.unused = nn.Parameter(torch.zeros(3).double())
    assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [])
    net(x).sum().backward()
    assert all((p.grad is None) == ("unused" in name) for name, p in net.named_parameters())


@stacks
def test_frozen_parameters_here_and_there(stack):
    net, x = network(stack), image()
    for p in [*net[0].parameters(), *net[-1].F.first.parameters(), *list(net.parameters())[::3]]:
        p.requires_grad_(False)
    assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [])


@stacks
def test_frozen_leading_blocks_are_not_rewound(stack):
    net, x, recomputed = network(stack), image(), set()
    for k, block in enumerate(net):
        for module in block.modules():
            module.register_forward_hook(lambda *_, k=k: recomputed.add(k) if revflow.is_recomputing() else None)
    trainable = [k for k, block in enumerate(net) if list(block.parameters())]
    for first in trainable:
        net.requires_grad_(True)[:first].requires_grad_(False)
        recomputed.clear()
        counts = evaluations(net, lambda: net(x).sum().backward())
        assert counts == [[1] * len(c) if k < first else c for k, c in enumerate(twice(net))]
        assert recomputed == set(range(first, len(net)))
        assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [])


@stacks
def test_everything_frozen(stack):
    """There is no graph, or one that leads to the input alone."""
    net, x = network(stack).requires_grad_(False), image()
    assert evaluations(net, lambda: net(x)) == [[1] * len(c) for c in twice(net)]
    assert not net(x).requires_grad
    x.requires_grad_()
    assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [x])


@stacks
def test_gradient_of_the_input_alone(stack):
    net, x, found = network(stack), image().requires_grad_(), []
    counts = evaluations(net, lambda: found.extend(torch.autograd.grad(weighted(net(x)), x)))
    assert counts == twice(net)
    assert_close(found, torch.autograd.grad(weighted(net.plain(x)), x))
    assert x.grad is None and all(p.grad is None for p in net.parameters())


@stacks
def test_gradient_of_any_parameters_reruns_no_block_in_vain(stack):
    """The blocks before the first one that is asked for run once."""
    net, x = network(stack), image().requires_grad_()
    parameters = {k: list(block.parameters())[-1] for k, block in enumerate(net) if list(block.parameters())}
    plain = dict(zip(parameters, torch.autograd.grad(weighted(net.plain(x)), parameters.values()), strict=True))
    for first, last in combinations_with_replacement(parameters, 2):
        wanted, found = {first, last}, []
        gradients = lambda w=wanted: torch.autograd.grad(weighted(net(x)), [parameters[k] for k in w])  # noqa: E731
        counts = evaluations(net, lambda g=gradients, found=found: found.extend(g()))
        assert counts == [[1] * len(c) if k < first else c for k, c in enumerate(twice(net))]
        assert_close(found, [plain[k] for k in wanted])


@stacks
def test_output_used_twice(stack):
    net, x = network(stack), image().requires_grad_()
    assert_same_gradients(net, *(lambda f=f: _used_twice(f(x)) for f in (net, net.plain)), [x])
    run, plain = (lambda f=f: (lambda a, b: a * b.sin() + a + b)(*f(x.chunk(2, 1))) for f in (net, net.plain))
    assert_same_gradients(net, run, plain, [x])


def _used_twice(y):
    return y.sin() + y * y.flip(1) + y[:1]


@stacks
def test_skip_connection_around(stack):
    net, x = network(stack), image().requires_grad_()

    def around(function):
        y = function(x)
        return y + (x if x.shape == y.shape else nn.functional.pixel_unshuffle(x, 2)) * y

    assert_same_gradients(net, lambda: around(net), lambda: around(net.plain), [x])


@stacks
def test_expanded_and_non_contiguous_gradients(stack):
    net, x = network(stack), image().requires_grad_()
    y, plain = net(x), net.plain(x)
    wanted = [x, *net.parameters()]
    for gradient in (
        torch.ones((), dtype=torch.float64).expand(y.shape),
        image(*y.shape[:2], 1, 1).expand(y.shape),
        image(*y.shape).transpose(2, 3).contiguous().transpose(2, 3),
        image(*y.shape[:3], 2 * y.shape[3])[..., ::2],
    ):
        found, expected = (torch.autograd.grad(o, wanted, gradient, retain_graph=True) for o in (y, plain))
        assert_close(found, expected)


@stacks
def test_several_gradients_at_once(stack):
    """`is_grads_batched` runs the backward pass under vmap."""
    net, x = network(stack), image().requires_grad_()
    y, plain = net(x), net.plain(x)
    gradients = image(3, *y.shape)
    found = torch.autograd.grad(y, x, gradients, is_grads_batched=True)[0]
    assert_close(found, [torch.autograd.grad(plain, x, g, retain_graph=True)[0] for g in gradients])


def test_coupling_of_three_streams():
    torch.manual_seed(0)

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x2, x3):
            return torch.tanh(self.conv(x2 * x3))

    net = revflow.ReversibleSequence([revflow.AdditiveCoupling(Sum()) for _ in range(4)]).double()
    x = streams(True, True, True)
    assert_same_gradients(net, joined(net, x), joined(net.plain, x), list(x))


@stacks
def test_nested_sequence_runs_twice(stack):
    """As the conditioner of another sequence's block."""
    inner = network(stack)
    back = nn.PixelShuffle(2) if stack.__name__ == "mixed" else nn.Identity()
    blocks = [revflow.AdditiveCoupling(nn.Sequential(inner, back)), additive(8), additive(8)]
    net, x = revflow.ReversibleSequence(blocks).double(), image(2, 16, 6, 4).requires_grad_()
    assert evaluations(net, lambda: net(x).sum().backward()) == twice(net)
    assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [x])


@pytest.mark.parametrize("make", [gated, gated_two])
@pytest.mark.parametrize("saturation", [-60.0, 60.0])
def test_gated_coupling_with_saturated_gates(make, saturation):
    """Every gate open or shut: gradients within 1e-5 of plain autograd, nothing infinite."""
    torch.manual_seed(0)
    net, x = revflow.ReversibleSequence([make() for _ in range(8)]), image(dtype=torch.float32)
    for conditioner in conditioners(net):
        conditioner.register_forward_hook(lambda module, args, out: (out[0] + saturation, out[1]))
    found, expected = (torch.autograd.grad(f(x).square().sum(), list(net.parameters())) for f in (net, net.plain))
    for f, e in zip(found, expected, strict=True):
        assert f.isfinite().all()
        assert (f - e).norm() <= 1e-5 * e.norm()
