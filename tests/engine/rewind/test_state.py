"""State: both runs of a conditioner see the same, and a step leaves it as ordinary autograd does."""

import copy
from itertools import permutations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import revflow
from engine.nets import (
    assert_close,
    assert_same_gradients,
    conditioners,
    couplings,
    image,
    network,
    stacks,
    weighted,
)


def state(net):
    return {k: v.clone() for k, v in net.state_dict().items()}


def assert_same_state(found, expected):
    assert list(found) == list(expected)
    for name in found:
        assert torch.allclose(found[name], expected[name], rtol=1e-10, atol=1e-13), name


@stacks
@pytest.mark.parametrize("mode", [True, False])
def test_dropout(stack, mode):
    net, x = network(stack, dropout=0.5).train(mode), image().requires_grad_()
    assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [x])


def random_states_of_a_step(net, x, run):
    torch.manual_seed(7)
    y = run(x)
    between = torch.get_rng_state()
    torch.rand(5)  # the loop draws, too
    y.sum().backward()
    return [between, torch.get_rng_state()]


@stacks
def test_random_state_is_where_plain_leaves_it(stack):
    net, x = network(stack, dropout=0.5), image()
    found, expected = (random_states_of_a_step(net, x, run) for run in (net, net.plain))
    assert all(map(torch.equal, found, expected))
    assert not torch.equal(expected[0], torch.manual_seed(7).get_state())  # dropout has drawn


@pytest.mark.cuda
@stacks
def test_dropout_and_random_state_on_cuda(stack):
    net, x = network(stack, dropout=0.5).cuda(), image().cuda().requires_grad_()
    assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [x])
    states = []
    for run in (net, net.plain):
        torch.manual_seed(7)
        y = run(x)
        torch.rand(5, device="cuda")
        y.sum().backward()
        states.append([torch.get_rng_state(), torch.cuda.get_rng_state()])
    assert all(map(torch.equal, *states))


def with_batch_norm(stack):
    net = network(stack)
    for c in conditioners(net):
        c.first.bias = None  # BatchNorm takes it out again: its gradient is rounding noise
        c.norm = nn.BatchNorm2d(6).double()
    return net


@stacks
def test_batch_norm_moves_its_statistics_once(stack):
    """A step in train mode moves them, one in eval mode does not; BatchNorm raises no version counter when it does."""
    net, twin = with_batch_norm(stack), with_batch_norm(stack)
    for step, mode in enumerate((True, True, False)):
        for model, run in ((net, net), (twin, twin.plain)):
            model.train(mode)
            weighted(run(image(seed=step))).backward()
        assert_same_state(net.state_dict(), twin.state_dict())
    counts = [v for k, v in net.state_dict().items() if k.endswith("num_batches_tracked")]
    assert counts == [2] * len(conditioners(net))
    assert_close([p.grad for p in net.parameters()], [p.grad for p in twin.parameters()])


@stacks
def test_batch_norm_with_backwards_in_any_order(stack):
    for order in permutations(range(2)):
        net, twin = with_batch_norm(stack), with_batch_norm(stack)
        for run in (net, twin.plain):
            losses = [weighted(run(image(seed=k))) for k in range(2)]
            for k in order:
                losses[k].backward()
                run(image(seed=4))
        assert_same_state(net.state_dict(), twin.state_dict())
        assert_close([p.grad for p in net.parameters()], [p.grad for p in twin.parameters()])


@stacks
def test_eval_mode_between_forward_and_backward(stack):
    net, x = network(stack, dropout=0.5), image().requires_grad_()

    def run(function):
        net.train()
        y = function(x)
        net.eval()
        return y

    assert_same_gradients(net, lambda: run(net), lambda: run(net.plain), [x])
    assert not any(m.training for m in net.modules())


@stacks
def test_train_mode_of_a_part(stack):
    """Each module's own mode comes back, not the sequence's."""
    net, x = network(stack, dropout=0.5).eval(), image().requires_grad_()
    dropouts = [c.dropout.train() for c in conditioners(net)[::2]]

    def run(function):
        net.eval()
        for d in dropouts:
            d.train()
        y = function(x)
        net.train()
        return y

    assert_same_gradients(net, lambda: run(net), lambda: run(net.plain), [x])
    assert all(m.training for m in net.modules())


@stacks
@pytest.mark.parametrize(
    "parametrization",
    [parametrizations.spectral_norm, parametrizations.weight_norm, nn.utils.spectral_norm, nn.utils.weight_norm],
    ids=["spectral_norm", "weight_norm", "spectral_norm by hooks", "weight_norm by hooks"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_parametrizations(stack, parametrization):
    """In train mode spectral norm's vectors move at each forward pass: as often as under ordinary autograd."""
    results, states = [], []
    for engine in (True, False):
        net, x = network(stack), image().requires_grad_()
        for c in conditioners(net):
            parametrization(c.first)
        found = []
        for _ in range(2):
            y = (net if engine else net.plain)(x)
            found += [y, *torch.autograd.grad(weighted(y), [x, *net.parameters()])]
        results.append(found)
        states.append(net.state_dict())
    assert_close(*results)
    assert_same_state(*states)


class Plain(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net.plain(x)


@stacks
@pytest.mark.parametrize("leaf", [True, False])
def test_functional_call_with_the_backward_after_the_swap(stack, leaf):
    """Parameters from elsewhere, as leaves or as results of a hypernetwork, and buffers from elsewhere."""
    net, x = with_batch_norm(stack), image().requires_grad_()
    start = {k: (1.1 * p.detach()).requires_grad_() for k, p in net.named_parameters()}
    own, results = state(net), []
    for prefix, model in (("", net), ("net.", Plain(net))):
        swapped = {prefix + k: p if leaf else 1.5 * p for k, p in start.items()}
        buffers = {prefix + k: b.clone() for k, b in net.named_buffers()}
        y = torch.func.functional_call(model, {**swapped, **buffers}, (x,))
        assert_same_state(net.state_dict(), own)
        found = torch.autograd.grad(weighted(y), [x, *start.values()])
        results.append([y, *found, *(b.double() for b in buffers.values())])
        assert_same_state(net.state_dict(), own)
        assert all(isinstance(p, nn.Parameter) for p in net.parameters())
    assert_close(*results)


@couplings
def test_same_block_twice_and_shared_weights(make):
    """One conditioner inside a block twice, in two blocks, and one block at two places."""
    torch.manual_seed(0)
    kind = type(make())
    shared = make().F
    block = kind(shared, shared)
    net = revflow.ReversibleSequence([block, kind(shared), make(), block]).double()
    x = image().requires_grad_()
    assert len(list(net.parameters())) == len(list(net[0].parameters())) + len(list(net[2].parameters()))
    assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [x])


@stacks
def test_parameters_shared_within_and_between_conditioners(stack):
    net, x = network(stack), image().requires_grad_()
    bias = net[0].F.norm.bias
    for c in conditioners(net):
        c.first.bias = c.norm.bias = bias
    assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [x])
    with torch.no_grad():
        bias.fill_(0.5)
    assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [x])


@couplings
def test_weights_shared_with_the_outside(make):
    """A head with the conditioner's own convolution."""
    torch.manual_seed(0)
    net = revflow.ReversibleSequence([make(), make()]).double()
    first, x = net[0].F.first, image(2, 4, 6, 4).requires_grad_()
    head = lambda: torch.cat([x, first(x)[:, :4]], 1)  # noqa: E731
    assert_same_gradients(net, lambda: net(head()), lambda: net.plain(head()), [x])


@stacks
@pytest.mark.parametrize(
    "change", ["a parameter", "the first parameter", "the optimizer", "output", "stream", "context"]
)
def test_change_in_place_before_backward_is_an_error(stack, change):
    net, x, condition = network(stack), image(), image(1, 1, 1, 1)
    y = net(x.chunk(2, 1) if change == "stream" else x, condition=condition)
    loss = (y[0] if change == "stream" else y).sum()
    with torch.no_grad():
        if change == "the optimizer":
            for p in net.parameters():
                p.grad = torch.ones_like(p)
            torch.optim.AdamW(net.parameters()).step()
        else:
            {
                "a parameter": net[1].F.last.weight,
                "the first parameter": next(net.parameters()),
                "output": y,
                "stream": y[-1],  # not in the loss, but the others are rebuilt from it
                "context": condition,
            }[change].mul_(1.01)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@stacks
def test_input_changed_in_place_is_right(stack):
    """Ordinary autograd refuses this."""
    net, x = network(stack), image()
    expected = torch.autograd.grad(weighted(net.plain(x)), list(net.parameters()))
    y = net(x)
    x.mul_(2)
    assert_close(torch.autograd.grad(weighted(y), list(net.parameters())), expected)


@stacks
def test_streams_changed_in_place_are_right_or_refused(stack):
    """A gated block in front keeps a stream: the user's own tensor, where a tuple was given."""
    net, streams = network(stack), tuple(s.contiguous() for s in image().chunk(2, 1))
    expected = torch.autograd.grad(weighted(torch.cat(net.plain(streams), 1)), list(net.parameters()))
    y = torch.cat(net(streams), 1)
    streams[0].mul_(2)
    if isinstance(net[0], revflow.GatedCoupling):
        with pytest.raises(RuntimeError, match=r"modified by an inplace|has been modified inplace"):
            weighted(y).backward()
    else:
        assert_close(torch.autograd.grad(weighted(y), list(net.parameters())), expected)


@stacks
def test_a_copy_has_its_own_state(stack):
    """A step of the copy neither sees nor moves the original's statistics, and the other way round."""
    net = with_batch_norm(stack)
    y = net(image())
    twin, before = copy.deepcopy(net), state(net)
    twin(image(seed=5)).sum().backward()
    y.sum().backward()
    assert_same_state(net.state_dict(), before)
    assert all(p.grad is not None for p in net.parameters())


@couplings
def test_a_conditioner_that_changes_its_input_in_place_is_refused(make):
    net = revflow.ReversibleSequence([make(), make()]).double()
    inside = nn.Sequential(nn.ReLU(inplace=True), net[1].F)
    net[1].F = inside
    with pytest.raises(RuntimeError, match=r"block 1 .*Sequential changed its input in place"):
        net(image())
    inside.insert(0, nn.Conv2d(4, 4, 1).double())
    x = image().requires_grad_()
    assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [x])
