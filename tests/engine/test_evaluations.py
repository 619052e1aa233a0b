"""How often conditioners run, and that the second run sees what the first one saw."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import revflow
from engine.nets import COUPLINGS, STACKS, Conditioner, assert_same_gradients, image, network, of_one

stacks = pytest.mark.parametrize("stack", STACKS, ids=lambda s: s.__name__)


def conditioners(net):
    return [m for m in net.modules() if isinstance(m, Conditioner)]


@stacks
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_each_conditioner_runs_exactly_twice(stack, direction):
    net = network(stack)
    x = net(image()).detach() if direction == "inverse" else image()
    for c in conditioners(net):
        c.calls = 0
    (net.inverse if direction == "inverse" else net)(x).sum().backward()
    assert [c.calls for c in conditioners(net)] == [2] * len(conditioners(net))


def test_without_gradients_conditioners_run_once():
    net = network(STACKS[-1])
    with torch.no_grad():
        net(image())
    assert {c.calls for c in conditioners(net)} == {1}


def test_is_recomputing_tells_the_runs_apart():
    net, seen = network(STACKS[0]), []
    for c in conditioners(net):
        c.register_forward_hook(lambda *_: seen.append(revflow.is_recomputing()))
    net(image()).sum().backward()
    assert seen == [False] * 3 + [True] * 3 and not revflow.is_recomputing()


@stacks
def test_dropout(stack):
    net, x = network(stack, dropout=0.5), image().requires_grad_()
    assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [x])


def test_random_state_ends_where_plain_leaves_it():
    net, x, states = network(STACKS[-1], dropout=0.5), image(), []
    for run in (net, net.plain):
        torch.manual_seed(7)
        run(x).sum().backward()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("make", COUPLINGS)
def test_batch_norm_moves_its_statistics_once(make):
    net = network(of_one(make))
    for c in conditioners(net):
        c.first.bias = None  # BatchNorm takes it out again: its gradient is rounding noise
        c.norm = nn.BatchNorm2d(6).double()
    x = image().requires_grad_()
    start = {k: v.clone() for k, v in net.state_dict().items()}
    net.plain(x).sum().backward()
    expected = {k: v.clone() for k, v in net.state_dict().items()}
    net.load_state_dict(start)
    net(x).sum().backward()
    assert any("running_mean" in k for k in expected)
    for k, v in net.state_dict().items():
        assert torch.equal(v, expected[k]), k
    net.load_state_dict(start)
    assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [x])


def test_eval_mode_between_forward_and_backward():
    net, x = network(STACKS[0], dropout=0.5), image().requires_grad_()

    def run(function):
        net.train()
        y = function(x)
        net.eval()
        return y

    assert_same_gradients(net, lambda: run(net), lambda: run(net.plain), [x])
    assert not any(m.training for m in net.modules())


@pytest.mark.parametrize("parametrization", [parametrizations.spectral_norm, parametrizations.weight_norm])
def test_parametrizations(parametrization):
    net, x = network(STACKS[0]), image().requires_grad_()
    for c in conditioners(net):
        parametrization(c.first)
    start = {k: v.clone() for k, v in net.state_dict().items()}

    def run(function):
        net.load_state_dict(start)
        return function(x)

    # one backward a forward: load_state_dict writes parameters, which must not happen in between
    gradients = []
    for function in (net, net.plain):
        gradients.append(torch.autograd.grad(run(function).square().sum(), [x, *net.parameters()]))
    for found, expected in zip(*gradients, strict=True):
        assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12)


def test_functional_call_with_the_backward_after_the_swap():
    net, x = network(STACKS[-1]), image()
    swapped = {k: (p.detach() * 1.1).requires_grad_() for k, p in net.named_parameters()}
    gradients = []
    for tie in (net, _Plain(net)):
        prefix = "" if tie is net else "net."
        y = torch.func.functional_call(tie, {prefix + k: p for k, p in swapped.items()}, (x,))
        gradients.append(torch.autograd.grad(y.square().sum(), list(swapped.values())))
    for found, expected in zip(*gradients, strict=True):
        assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12)


class _Plain(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net.plain(x)


@pytest.mark.parametrize("backward_inside", [True, False])
def test_autocast(backward_inside):
    """Under bf16 autocast both runs cast alike: the gradient error stays that of plain autocast."""
    net, x = network(STACKS[0], dtype=torch.float32), image(dtype=torch.float32)
    exact = torch.autograd.grad(net.plain(x).square().sum(), list(net.parameters()))
    errors = []
    for run in (net, net.plain):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            y = run(x)
            assert y.dtype == torch.float32
            if backward_inside:
                found = torch.autograd.grad(y.square().sum(), list(net.parameters()))
        if not backward_inside:
            found = torch.autograd.grad(y.square().sum(), list(net.parameters()))
        errors.append(max(((f - e).norm() / e.norm()).item() for f, e in zip(found, exact, strict=True)))
    reversible, plain = errors
    assert 1e-4 < plain < 5e-2  # bf16 is really on
    assert reversible < 1.5 * plain


@pytest.mark.parametrize("backward_inside", [True, False])
def test_both_runs_see_the_same_autocast_state(backward_inside):
    net, x, seen = network(STACKS[0], dtype=torch.float32), image(dtype=torch.float32), []
    for c in conditioners(net):
        c.first.register_forward_hook(
            lambda module, args, out: seen.append((out.dtype, torch.is_autocast_cache_enabled()))
        )
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)
        if backward_inside:
            y.sum().backward()
        assert torch.is_autocast_cache_enabled()
    if not backward_inside:
        with torch.autocast("cpu", torch.float16):  # another state than the forward pass's
            y.sum().backward()
    assert seen == [(torch.bfloat16, False)] * 6


def test_autocast_leaves_no_weight_untrained_in_plain_autograd_after_it():
    net, x = network(STACKS[0], dtype=torch.float32), image(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        net(x)
        y = net.plain(x)
    gradients = torch.autograd.grad(y.sum(), list(net.parameters()), allow_unused=True)
    assert all(g is not None for g in gradients)
