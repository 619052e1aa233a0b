"""torch.func's transforms and forward-mode differentiation take the plain path; vmap and inference mode too."""

import pytest
import torch

from engine.nets import STACKS, image, network, relative_error

stacks = pytest.mark.parametrize("stack", STACKS, ids=lambda s: s.__name__)


@stacks
def test_func_grad_and_vmap(stack):
    net, x = network(stack), image()
    parameters = dict(net.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(net, parameters, (x[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for name, gradient in found.items():
        for k in range(len(x)):
            expected = torch.autograd.grad(net.plain(x[k : k + 1]).square().sum(), parameters[name])[0]
            assert relative_error(gradient[k], expected) < 1e-10, name


@stacks
def test_forward_mode(stack):
    net, x, tangent = network(stack), image(), image(seed=2)
    with torch.autograd.forward_ad.dual_level():
        y = net(torch.autograd.forward_ad.make_dual(x, tangent))
        found = torch.autograd.forward_ad.unpack_dual(y).tangent
    step = 1e-6
    with torch.no_grad():
        expected = (net.plain(x + step * tangent) - net.plain(x - step * tangent)) / (2 * step)
    assert relative_error(found, expected) < 1e-7


def test_inference_mode():
    net, x = network(STACKS[-1]), image()
    with torch.inference_mode():
        y = net(x)
    assert y.is_inference() and torch.equal(y, net.plain(x))


def test_saved_tensors_hooks_see_the_output_and_the_rewind_uses_what_they_return():
    net, x, seen = network(STACKS[0]), image().requires_grad_(), []

    def pack(t):
        seen.append(t.shape)
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = net(x)
    assert y.shape in seen
    expected = torch.autograd.grad(net.plain(x).square().sum(), x)[0]
    assert relative_error(torch.autograd.grad(y.square().sum(), x)[0], expected) < 1e-10


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_inside_a_checkpoint(use_reentrant):
    net, x = network(STACKS[-1], dropout=0.5), image().requires_grad_()
    gradients = []
    for run in (lambda x: torch.utils.checkpoint.checkpoint(net, x, use_reentrant=use_reentrant), net.plain):
        torch.manual_seed(7)
        run(x).square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in net.parameters())])
        x.grad = None
        net.zero_grad()
    for found, expected in zip(*gradients, strict=True):
        assert relative_error(found, expected) < 1e-10
