"""Hooks: those of autograd fire as under ordinary autograd, those inside a block's forward in both of its runs."""

import pytest
import torch

import revflow
from engine.nets import Scale, additive, assert_close, conditioners, image, network, stacks, weighted


@stacks
def test_inner_forward_hooks_fire_in_both_runs_and_can_tell(stack):
    net, seen = network(stack), {}
    for c in conditioners(net):
        for module in (c, c.norm):
            module.register_forward_hook(lambda m, *_: seen.setdefault(m, []).append(revflow.is_recomputing()))
    net(image()).sum().backward()
    assert len(seen) == 2 * len(conditioners(net)) and all(s == [False, True] for s in seen.values())
    assert not revflow.is_recomputing()


@stacks
def test_forward_hooks_of_blocks_fire_once(stack):
    net, seen = network(stack), []
    blocks = [block for block in net if isinstance(block, revflow.Coupling)]
    for block in blocks:
        block.register_forward_pre_hook(lambda m, *_: seen.append(("before", m)))
        block.register_forward_hook(lambda m, *_: seen.append(("after", m)))
    net(image()).sum().backward()
    assert seen == [(when, block) for block in blocks for when in ("before", "after")]


@stacks
@pytest.mark.parametrize("shared", [False, True])
def test_parameter_hook_fires_once_on_the_summed_gradient(stack, shared):
    """Also where the parameter is shared by all conditioners; what the hook returns takes the gradient's place."""
    net, x, results = network(stack), image(), []
    if shared:
        for c in conditioners(net):
            c.norm.bias = net[0].F.norm.bias
    for run in (net, net.plain):
        seen, hooks = [], []
        for p in net.parameters():
            hooks.append(p.register_hook(lambda g, seen=seen: (seen.append(g), 3 * g)[1]))
        net.zero_grad()
        weighted(run(x)).backward()
        assert len(seen) == len(list(net.parameters()))
        by_norm = sorted(seen, key=torch.linalg.vector_norm)  # hooks of one block may fire in any order
        results.append([*by_norm, *(p.grad for p in net.parameters())])
        for hook in hooks:
            hook.remove()
    assert_close(*results)


@stacks
def test_post_accumulate_hooks_fire_block_by_block(stack):
    """Before the block in front is run again: an optimizer can step, and a bucket leave, as the backward proceeds."""
    net, events = network(stack), []
    for k, block in enumerate(net):
        for p in block.parameters():
            p.register_post_accumulate_grad_hook(lambda p, k=k: events.append(("accumulated", k)))
        for c in conditioners(block):
            c.register_forward_hook(lambda *_, k=k: events.append(("run", k)))
    y = net(image())
    events.clear()
    y.sum().backward()
    expected = []
    for k, block in reversed(list(enumerate(net))):
        expected += [("run", k)] * len(conditioners(block)) + [("accumulated", k)] * len(list(block.parameters()))
    assert events == expected


@stacks
def test_a_step_in_the_backward(stack):
    """An optimizer step in the post-accumulate hook, which frees each gradient at once."""
    net, x, results = network(stack), image().requires_grad_(), []
    start = {k: v.clone() for k, v in net.state_dict().items()}
    for run in (net, net.plain):
        net.load_state_dict(start)
        hooks = [p.register_post_accumulate_grad_hook(_step) for p in net.parameters()]
        x.grad = None
        weighted(run(x)).backward()
        assert all(p.grad is None for p in net.parameters())
        results.append([x.grad, *(p.detach().clone() for p in net.parameters())])
        for hook in hooks:
            hook.remove()
    assert_close(*results)


def _step(parameter):
    with torch.no_grad():
        parameter -= 0.1 * parameter.grad
    parameter.grad = None


@stacks
@pytest.mark.parametrize("where", ["blocks", "conditioners", "inside conditioners", "sequence"])
def test_full_backward_hooks_fire_once(stack, where):
    """With the gradients of ordinary autograd."""
    results = []
    for engine in (True, False):
        net, x, seen = network(stack), image().requires_grad_(), []
        modules = {
            "blocks": list(net),
            "conditioners": conditioners(net),
            "inside conditioners": [c.norm for c in conditioners(net)],
            "sequence": [net],
        }[where]
        for module in modules:
            module.register_full_backward_pre_hook(lambda m, outputs, seen=seen: seen.extend(outputs))
            module.register_full_backward_hook(lambda m, inputs, outputs, seen=seen: seen.extend([*inputs, *outputs]))
        if not engine:
            net.forward = net.plain
        weighted(net(x)).backward()
        assert len(seen) >= 3 * len(modules)
        results.append([*seen, x.grad, *(p.grad for p in net.parameters())])
    assert_close(*results)


@stacks
def test_full_backward_hook_that_changes_the_gradient(stack):
    results = []
    for engine in (True, False):
        net, x = network(stack), image().requires_grad_()
        for module in (net[1], net[-1].F, net[0].F.norm):
            module.register_full_backward_hook(lambda m, inputs, outputs: tuple(2 * g for g in inputs))
        y = (net if engine else net.plain)(x)
        results.append(torch.autograd.grad(weighted(y), [x, *net.parameters()]))
    assert_close(*results)


@stacks
def test_tensor_hooks_and_retained_gradients(stack):
    """On the input, on what comes before it, and on the output."""
    net, leaf, results = network(stack), image().requires_grad_(), []
    for run in (net, net.plain):
        seen = []
        x = 2 * leaf
        x.retain_grad()
        x.register_hook(seen.append)
        y = run(x)
        y.retain_grad()
        y.register_hook(lambda g, seen=seen: (seen.append(g), 3 * g)[1])
        leaf.grad = None
        weighted(y).backward()
        assert len(seen) == 2
        results.append([*seen, x.grad, y.grad, leaf.grad])
    assert_close(*results)


@stacks
@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_that_changes_streams_is_refused(stack, hook):
    net = network(stack)
    getattr(net[1], hook)(lambda module, args, *outputs: tuple(2 * s for s in (outputs[0] if outputs else args)))
    with pytest.raises(RuntimeError, match=r"block 1 \(\w+\).*hook replaced its"):
        net(image())


@stacks
def test_a_hook_that_changes_a_stream_in_place_is_refused(stack):
    net = network(stack)
    net[0].register_forward_hook(lambda module, args, outputs: (outputs[1].mul_(2), None)[1])
    with pytest.raises(RuntimeError, match=r"block 0 \(\w+\).*hook replaced its output"):
        net(image())


@stacks
def test_a_hook_on_a_conditioner_may_change_what_it_returns(stack):
    """It is part of the conditioner, and runs twice with it."""
    net, x = network(stack), image().requires_grad_()
    for c in conditioners(net):
        c.last.register_forward_hook(lambda module, args, out: 0.5 * out.sin())
    found, expected = (torch.autograd.grad(weighted(f(x)), [x, *net.parameters()]) for f in (net, net.plain))
    assert_close(found, expected)


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_that_changes_the_streams_of_another_block_is_found_by_the_guard(hook):
    """The engine inverts such a block as a whole. Only the recomputed values differ."""
    net = network(lambda: [additive(), Scale(), additive()])
    getattr(net[1], hook)(lambda module, args, *outputs: tuple(s + 1 for s in (outputs[0] if outputs else args)))
    y = net(image().requires_grad_())
    with pytest.raises(revflow.ReconstructionError, match=r"block 1 \(Scale\)"):
        y.sum().backward()
