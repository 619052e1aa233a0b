"""How long a graph lives, in which order its backward passes run, and what is left when it is gone."""

import gc
from itertools import permutations

import pytest
import torch

import revflow
from engine.nets import assert_close, image, network, stacks, weighted


def gradients(y, *wanted):
    return torch.autograd.grad(weighted(y), wanted, retain_graph=True)


@stacks
def test_a_retained_graph_gives_the_same_again(stack):
    net, x = network(stack, dropout=0.3), image().requires_grad_()
    y = net(x)
    first, second = (gradients(y, x, *net.parameters()) for _ in range(2))
    assert all(map(torch.equal, first, second))


@stacks
def test_a_second_backward_accumulates(stack):
    net, x = network(stack), image().requires_grad_()
    once = torch.autograd.grad(weighted(net.plain(x)), [x, *net.parameters()])
    loss = weighted(net(x))
    loss.backward(retain_graph=True)
    loss.backward()
    assert_close([x.grad, *(p.grad for p in net.parameters())], [2 * g for g in once])


@stacks
def test_second_backward_without_retain_graph_is_pytorchs_error(stack):
    net = network(stack)
    y = net(image()).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward()


@stacks
def test_accumulation_over_batches(stack):
    net, results = network(stack, dropout=0.3), []
    for run in (net, net.plain):
        torch.manual_seed(7)
        net.zero_grad()
        for k in range(3):
            weighted(run(image(seed=k))).backward()
        results.append([p.grad for p in net.parameters()])
    assert_close(*results)


@stacks
@pytest.mark.parametrize("order", list(permutations(range(3))), ids=str)
def test_forwards_before_backwards_in_any_order(stack, order):
    """With dropout: each rerun draws what its own forward drew, and leaves the others' draws alone."""
    net, x, results = network(stack, dropout=0.5), image().requires_grad_(), []
    for run in (net, net.plain):
        torch.manual_seed(7)
        ys = [run(x), run(2 * x)]
        found = []
        for k in order:
            if k == order[1]:
                ys.append(run(3 * x))  # between two backward passes
            found += gradients(ys[min(k, len(ys) - 1)], x, *net.parameters())
        results.append([*ys, *found, torch.rand(3).double()])
    assert_close(*results)


@stacks
def test_two_graphs_in_one_backward(stack):
    net, x, results = network(stack, dropout=0.5), image().requires_grad_(), []
    for run in (net, net.plain):
        torch.manual_seed(7)
        results.append(gradients(run(x) * run(2 * x), x, *net.parameters()))
    assert_close(*results)


@stacks
def test_a_partial_backward_within_another(stack):
    """A hook that differentiates the same graph while it is being differentiated: the two do not mix."""
    net, x, inner = network(stack), image().requires_grad_(), []
    last = list(net[-1].parameters())[-1]
    y = net(x)
    loss = weighted(y)
    last.register_hook(lambda gradient: inner.extend(torch.autograd.grad(loss, [x], retain_graph=True)))
    found = gradients(y, x, *net.parameters())
    expected = gradients(net.plain(x), x, *net.parameters())
    assert_close(found, expected)
    assert_close(inner[:1], expected[:1])


class InjectedError(Exception):
    pass


def fail_in_rerun(*_):
    if revflow.is_recomputing():
        raise InjectedError


@stacks
def test_a_retry_after_an_exception_in_the_rerun_is_right(stack):
    """And everything is as the rerun found it: modes, the random state, the modules' parameters."""
    net, x = network(stack, dropout=0.5), image().requires_grad_()
    torch.manual_seed(7)
    y = net(x)
    torch.manual_seed(7)
    expected = gradients(net.plain(x), x, *net.parameters())
    parameters = dict(net.named_parameters())
    next(net.parameters()).register_hook(lambda g: g)  # so that an alias takes its place in the rerun
    state = torch.get_rng_state()
    for block in net:
        net.eval()
        hook = (block.F if hasattr(block, "F") else block).register_forward_hook(fail_in_rerun)
        with pytest.raises(InjectedError):
            gradients(y, x)
        hook.remove()
        assert not any(m.training for m in net.modules())
        assert all(p is parameters[name] for name, p in net.named_parameters())
        assert torch.equal(torch.get_rng_state(), state) and not revflow.is_recomputing()
        assert_close(gradients(y, x, *net.parameters()), expected)


@stacks
@pytest.mark.parametrize("guard", ["off", "warn"])
def test_no_byte_is_left_behind(stack, guard):
    """After ten partial gradients, an exception in the rerun and dropped outputs, with garbage collection off."""
    net = revflow.ReversibleSequence(network(stack, dropout=0.5), guard=guard)
    x, parameters = image(1, 8, 2, 2).requires_grad_(), list(net.parameters())

    def misuse():
        y = net(x)
        for k in range(10):
            gradients(y, parameters[k * len(parameters) // 10])
        hook = net[1].F.register_forward_hook(fail_in_rerun)
        with pytest.raises(InjectedError):
            gradients(y, x)
        hook.remove()
        gradients(y, x)
        net(x)
        torch.autograd.grad(weighted(net(x)), x)

    gc.collect()
    gc.disable()
    try:
        assert revflow.measure_memory(misuse).kept == 0
    finally:
        gc.enable()
