"""Log-determinants: against autograd's Jacobian, and their gradients against the plain chain's."""

import pytest
import torch
from torch import nn

import revflow
from engine.nets import (
    Scale,
    additive,
    additive_two,
    affine,
    affine_two,
    assert_close,
    assert_same_gradients,
    conditioners,
    evaluations,
    image,
    network,
    stacks,
    weighted,
)


def plain(net, x, **context):
    """Output and log-determinant by hand, under ordinary autograd and without the engine's code."""
    x1, x2 = x.chunk(2, 1)
    log_det = 0
    for block in net:
        if isinstance(block, Scale):
            log_det = log_det + block.log_scale * (x1[0].numel() + x2[0].numel())
        if not isinstance(block, revflow.Coupling):
            x1, x2 = block(x1, x2)
            continue
        for conditioner in (block.F, block.G):
            if conditioner is not None:
                t = conditioner(x2, **context)
                t = t if isinstance(t, tuple) else (t,)
                y1, slope = change(block, x1, *t)
                log_det = log_det + slope.log().flatten(1).sum(1)
                x1, x2 = x2, y1
    return torch.cat((x1, x2), 1), log_det


def change(block, x, *t):
    """The changed stream and its derivative in x."""
    if isinstance(block, revflow.AdditiveCoupling):
        return x + t[0], torch.ones_like(x)
    if isinstance(block, revflow.AffineCoupling):
        return x * t[0].exp() + t[1], t[0].exp()
    if isinstance(block, revflow.GatedCoupling):
        gate = t[0].sigmoid()
        return (1 - gate) * x + gate * t[1], 1 - gate
    raise NotImplementedError(f"{type(block).__name__}: add the coupling's derivative here")


@stacks
def test_equals_that_of_autograds_jacobian(stack):
    net, x = network(stack), image(2, 8, 2, 2)
    y, log_det = net.forward_with_log_det(x)
    assert torch.equal(y, net(x)) and log_det.shape == (2,)
    for k in range(2):
        jacobian = torch.autograd.functional.jacobian(lambda x: net.plain(x[None]).flatten(), x[k]).flatten(1)
        assert torch.allclose(torch.linalg.slogdet(jacobian).logabsdet, log_det[k], rtol=1e-10, atol=1e-10)


@stacks
def test_of_the_inverse_of_a_block_alone(stack):
    """A sequence of one block's inverse: its log-determinant is minus the block's."""

    class Inverse(revflow.Bijection):
        def __init__(self, block):
            super().__init__()
            self.chain = revflow.ReversibleSequence([block])

        def forward(self, *streams):
            return self.chain.inverse(streams)

        def inverse(self, *streams):
            return self.chain(streams)

        def log_det(self, *streams):
            return -self.chain.forward_with_log_det(self.chain.inverse(streams))[1]

    x = image(2, 8, 2, 2).requires_grad_()
    for block in network(stack):
        if not isinstance(block, revflow.PixelUnshuffle) and _channels(block) == 4:
            net = revflow.ReversibleSequence([block, Inverse(block)])
            y, log_det = net.forward_with_log_det(x)
            assert_close([y], [x])
            assert log_det.abs().max() < 1e-10


def _channels(block):
    return block.F.first.in_channels if isinstance(block, revflow.Coupling) else 4


@stacks
@pytest.mark.parametrize("loss", ["log_det", "both", "y", "one sample", "square"])
def test_gradients(stack, loss):
    net, x, condition = network(stack), image().requires_grad_(), image(1, 1, 1, 1, seed=5).requires_grad_()
    wanted, results = [x, condition, *net.parameters()], []
    for function in (net.forward_with_log_det, lambda x, **context: plain(net, x, **context)):
        y, log_det = function(x, condition=condition)
        if not isinstance(log_det, torch.Tensor) or not log_det.requires_grad:
            log_det = y.sum((1, 2, 3)) * 0 + log_det  # volume-preserving
        value = {
            "log_det": log_det.sum(),
            "both": weighted(y) - 0.1 * log_det.sum(),
            "y": weighted(y),
            "one sample": log_det[1],
            "square": log_det.square().sum() + y.square().sum(),
        }[loss]
        found = torch.autograd.grad(value, wanted, allow_unused=True)
        results.append(
            [y, log_det, *(torch.zeros_like(w) if g is None else g for g, w in zip(found, wanted, strict=True))]
        )
    assert_close(*results)


@stacks
@pytest.mark.parametrize("loss", ["log_det", "both"])
def test_costs_no_further_evaluation(stack, loss):
    net, x = network(stack), image().requires_grad_()

    def step():
        y, log_det = net.forward_with_log_det(x)
        (log_det.sum() if loss == "log_det" else log_det.sum() + y.sum()).backward()

    assert evaluations(net, step) == [[2] * len(conditioners(block)) for block in net]


@stacks
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(stack, mode):
    net, x = network(stack), image()
    with mode():
        y, log_det = net.forward_with_log_det(x)
    assert not y.requires_grad and not log_det.requires_grad
    assert_close([y, log_det], [net(x), net.forward_with_log_det(x)[1]])


@stacks
def test_streams_as_a_tuple(stack):
    net, x = network(stack), image()
    streams, log_det = net.forward_with_log_det(tuple(x.chunk(2, 1)))
    y, expected = net.forward_with_log_det(x)
    assert isinstance(streams, tuple)
    assert_close([torch.cat(streams, 1), log_det], [y, expected])


@stacks
def test_with_dropout_and_a_second_call_in_between(stack):
    net, x = network(stack, dropout=0.5), image().requires_grad_()

    def run(function):
        y, log_det = function(x)
        function(2 * x)
        return y.flatten(1).sum(1).sin() + 0.1 * log_det

    assert_same_gradients(net, lambda: run(net.forward_with_log_det), lambda: run(lambda x: plain(net, x)), [x])


@stacks
def test_empty_batch_and_no_blocks(stack):
    _, log_det = network(stack).forward_with_log_det(image(0, 8, 6, 4))
    assert log_det.shape == (0,)
    x = image().requires_grad_()
    y, log_det = revflow.ReversibleSequence().forward_with_log_det(x)
    assert torch.equal(y, x) and torch.equal(log_det, torch.zeros(2).double())


@pytest.mark.parametrize("make", [additive, additive_two, affine, affine_two])
def test_memory_is_as_flat_as_forwards(make):
    """One value a sample more."""

    def kept(depth):
        torch.manual_seed(0)
        net, x = revflow.ReversibleSequence([make() for _ in range(depth)], guard="off").double(), image()
        return revflow.measure_memory(lambda: net.forward_with_log_det(x)).kept

    assert kept(4) == kept(16) == image().nbytes + 2 * 8


class Doubling(revflow.Coupling):
    coefficients = ("shift",)
    combine = staticmethod(lambda x, shift: 2 * x + shift)
    separate = staticmethod(lambda y, shift: (y - shift) / 2)


class Twice(revflow.Bijection):
    def forward(self, *streams):
        return tuple(2 * s for s in streams)

    def inverse(self, *streams):
        return tuple(s / 2 for s in streams)


class WithoutBase(nn.Module):
    forward, inverse = Twice.forward, Twice.inverse


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (lambda: Doubling(nn.Identity()), "write its static method log_derivative"),
        (Twice, "write its method log_det"),
        (WithoutBase, "write its method log_det"),
    ],
)
def test_a_block_without_log_determinant_is_named(block, reason, gradients):
    net = revflow.ReversibleSequence([additive().double(), block()])
    name = type(net[1]).__name__
    with (
        torch.set_grad_enabled(gradients),
        pytest.raises(NotImplementedError, match=rf"block 1 \({name}\).*({reason})"),
    ):
        net.forward_with_log_det(image())
    assert net(image()).shape == image().shape


def test_a_log_determinant_of_another_shape_is_refused():
    class Wrong(Twice):
        def log_det(self, *streams):
            return streams[0].new_zeros(())

    with pytest.raises(ValueError, match=r"block 0 \(Wrong\).*one value per sample.*shape \(\)"):
        revflow.ReversibleSequence([Wrong()]).forward_with_log_det(image())


def test_a_coupling_of_your_own():
    class WithDerivative(Doubling):
        log_derivative = staticmethod(lambda x, shift: torch.full_like(x, 2.0).log())

    net, x = revflow.ReversibleSequence([WithDerivative(nn.Tanh()) for _ in range(3)]), image(1, 2, 2, 2)
    _, log_det = net.forward_with_log_det(x)
    jacobian = torch.autograd.functional.jacobian(lambda x: net.plain(x).flatten(), x).flatten(1)
    assert torch.allclose(torch.linalg.slogdet(jacobian).logabsdet, log_det, rtol=1e-10)
