"""What conditioners see, draw and change, with chunks."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import revflow
from engine.exactly import watch
from engine.nets import (
    Conditioner,
    Scale,
    additive,
    assert_close,
    assert_same_gradients,
    conditioners,
    evaluations,
    image,
    mixed,
    relative_error,
    stacks,
    weighted,
)
from engine.slices import (
    BATCH,
    Norms,
    batch,
    few_stacks,
    gradients_of,
    in_slices,
    one_block,
    per_sample,
    sliced,
    snapshot,
    values,
)

# Evaluations


@few_stacks
@pytest.mark.parametrize(("chunks", "slices"), [(2, 2), (4, 3), (9, 5)])
def test_evaluations(stack, chunks, slices):
    """Of five samples; the first time, two more find whether samples mix."""
    net, x = sliced(stack, chunks), batch()
    assert all(n == 2 + 2 * slices for b in evaluations(net, lambda: net(x).sum().backward()) for n in b)
    assert all(n == slices for b in evaluations(net, lambda: net(x)) for n in b)
    assert all(n == 2 * slices for b in evaluations(net, lambda: net(x).sum().backward()) for n in b)
    for run in (net.plain, torch.no_grad()(net)):
        assert all(n == 1 for b in evaluations(net, lambda run=run: run(x)) for n in b)
    unguarded = revflow.ReversibleSequence(net, chunks=chunks, guard="off")
    assert all(n == 2 * slices for b in evaluations(unguarded, lambda: unguarded(x).sum().backward()) for n in b)


def test_what_conditioners_see():
    """Slices of as many samples as there are, but for the last; the same in both evaluations."""
    net, x = sliced(mixed, 2), batch()
    net(x).sum().backward()
    given, again = watch(net)
    net(x).sum().backward()
    assert [len(a) for (a,) in given] == [3, 2] * len(conditioners(net))
    assert len(given) == len(again)
    firsts, rewound = ([torch.cat((a, b)) for (a,), (b,) in zip(s[::2], s[1::2], strict=True)] for s in (given, again))
    for a, b in zip(firsts, reversed(rewound), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


# Random numbers and state


@stacks
@pytest.mark.parametrize("chunks", [2, 7])
def test_dropout(stack, chunks):
    """The masks are those of slices, in both evaluations; and all random numbers are drawn once."""
    net, x = sliced(stack, chunks, dropout=0.5), batch()
    results, states = [], []
    for run in (net, in_slices(net).plain, net):
        torch.manual_seed(7)
        y = run(x)
        states.append([torch.get_rng_state()])
        torch.rand(3)
        results.append(gradients_of(y, [x, *net.parameters()]))
        states[-1].append(torch.get_rng_state())
    for k in (0, 2):  # with the search for mixed samples, and without
        assert_close(results[k], results[1])
        assert all(map(torch.equal, states[k], states[1]))
    y = net.eval()(x)
    assert_close([y], [net.plain(x)])


def test_dropout_with_two_backward_passes_and_other_draws_in_between():
    net, x = sliced(mixed, 2, dropout=0.5), batch()
    torch.manual_seed(7)
    expected = gradients_of(in_slices(net).plain(x), [x, *net.parameters()])
    torch.manual_seed(7)
    y = net(x)
    for mode in (True, False):
        net.train(mode)
        torch.rand(100)
        assert_close([y, *torch.autograd.grad(weighted(y), [x, *net.parameters()], retain_graph=True)], expected)


class DropPath(nn.Module):
    """Leaves out the whole of a slice at times: its gradients are None then."""

    def __init__(self, uses_input=True):
        super().__init__()
        self.conditioner, self.uses_input = Conditioner(4), uses_input

    def forward(self, x, condition=None):
        if torch.rand(()) < 0.5:
            return torch.zeros_like(x)
        return self.conditioner(x if self.uses_input else torch.ones_like(x), condition=condition)


@pytest.mark.parametrize("seed", range(6))
def test_slices_without_a_gradient_have_one_of_zero(seed):
    torch.manual_seed(0)
    net = revflow.ReversibleSequence([revflow.AdditiveCoupling(DropPath()) for _ in range(2)], chunks=5, guard="off")
    net, c = net.double(), per_sample()
    streams = tuple(image(BATCH, 4, 6, 4, seed=s).requires_grad_() for s in range(2))
    wanted = [*streams, c, *net.parameters()]
    poison = [torch.full((BATCH, 4, 6, 4), float("nan"), dtype=torch.float64) for _ in range(20)]
    poison += [torch.full((BATCH, 6, 1, 1), float("nan"), dtype=torch.float64) for _ in range(20)]
    results = []
    for run in (net, in_slices(net).plain):
        torch.manual_seed(seed)
        y = run(streams, condition=c)[1]
        poison.clear()  # whose memory the allocator gives out again
        results.append(torch.autograd.grad(weighted(y), wanted, allow_unused=True, materialize_grads=True))
    assert_close(*results)


def spectral(module):
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            parametrizations.spectral_norm(m)


def weight(module):
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            parametrizations.weight_norm(m)


@few_stacks
@pytest.mark.parametrize("norm", [spectral, weight])
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_parametrizations(stack, norm, mode):
    """Each slice moves spectral norm's vectors, once; its gradients are of the weights that it has computed with."""
    net = sliced(stack, 2)
    norm(net)
    net.double().train(mode)
    x, start = batch(), snapshot(net)
    results, states = [], []
    for run in (in_slices(net).plain, net, net):
        net.load_state_dict(start)
        y = run(x)
        states.append(snapshot(net))
        results.append(gradients_of(y, [x, *net.parameters()]))
        assert all(torch.equal(net.state_dict()[name], value) for name, value in states[-1].items())
    for k in (1, 2):
        assert_close(results[k], results[0])
        assert_close(values(states[k]), values(states[0]))
    moved = any(not torch.equal(states[0][name], start[name]) for name in start)
    assert moved == (mode and norm is spectral)


@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.GroupNorm(2, 4),
        lambda: nn.LayerNorm([4, 6, 4]),
        lambda: nn.InstanceNorm2d(4, affine=True),
        lambda: nn.BatchNorm2d(4).eval(),
    ],
    ids=["group", "layer", "instance", "batch, in eval mode"],
)
def test_norms(norm):
    torch.manual_seed(0)
    net, x = one_block(Norms(norm())), batch()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
    assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [x])


def test_averages_move_once_a_slice():
    torch.manual_seed(0)
    net, x = one_block(Norms(nn.InstanceNorm2d(4, track_running_stats=True))), batch()
    start, oracle = snapshot(net), in_slices(net)
    states = []
    for run in (oracle.plain, net):
        net.load_state_dict(start)
        weighted(run(x)).backward()
        states.append(snapshot(net))
    assert_close(values(states[1]), values(states[0]))
    net.load_state_dict(start)
    net.plain(x)
    assert relative_error(net[0].F.norm.running_mean, states[0]["0.F.norm.running_mean"]) > 0.1


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm, nn.LazyBatchNorm2d])
@pytest.mark.parametrize("guard", ["warn", "off"])
def test_batch_norm_in_train_mode_is_refused(norm, guard):
    net, x = one_block(Norms(norm(4) if norm is not nn.LazyBatchNorm2d else norm()), guard=guard), batch()
    if norm is nn.LazyBatchNorm2d:
        with torch.no_grad():
            net(x)
    message = r"block 0 \(AdditiveCoupling\).*chunks=2: a \w*BatchNorm\w* in train mode mixes the samples"
    for run in (net, net.inverse, net.forward_with_log_det):
        with pytest.raises(ValueError, match=message):
            run(x)
    if norm is nn.BatchNorm2d:
        with torch.no_grad():
            net(x)
        net[0].F.norm.eval()
        assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [x])


@pytest.mark.parametrize("mode", [True, False])
def test_batch_norm_without_statistics_is_refused(mode):
    net = one_block(Norms(nn.BatchNorm2d(4, track_running_stats=False))).train(mode)
    which = "in train mode" if mode else "without running statistics"
    with pytest.raises(ValueError, match=rf"block 0 .*a BatchNorm2d {which} mixes the samples"):
        net(batch())


def test_batch_norm_in_a_whole_block_is_not_sliced():
    class Whole(Scale):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(4)

        def forward(self, *streams):
            return (streams[0], streams[1] + self.norm(streams[0]))

        def inverse(self, *streams):
            return (streams[0], streams[1] - self.norm(streams[0]))

    torch.manual_seed(0)
    net, x = revflow.ReversibleSequence([Whole(), additive()], chunks=2).double(), batch()
    assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [x])
