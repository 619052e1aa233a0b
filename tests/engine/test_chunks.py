"""chunks: conditioners that are rerun see the batch in slices, and everything else is as without them.

Where something is drawn or moved, the oracle is ordinary autograd through the same conditioners in the same slices.
"""

import copy
import io
import pickle
import random

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import revflow
from engine.exactly import assert_equal, frames, watch
from engine.exactly import network as exact_network
from engine.exactly import stacks as exact_stacks
from engine.nets import (
    Conditioner,
    Scale,
    additive,
    additive_two,
    affine,
    assert_close,
    assert_same_gradients,
    conditioners,
    couplings,
    evaluations,
    gated,
    gated_two,
    image,
    mixed,
    network,
    of_one,
    plain_inverse,
    relative_error,
    stacks,
    weighted,
)
from revflow.budget import Budget

BATCH = 5
FEW = [of_one(additive_two), of_one(gated), mixed]
few_stacks = pytest.mark.parametrize("stack", FEW, ids=lambda s: s.__name__)
sizes = pytest.mark.parametrize("batch", [5, 1])


def sliced(stack, chunks=2, **options):
    net = network(stack, **options)
    net.chunks = chunks
    return net


def batch(*shape, seed=1):
    return image(*(shape or (BATCH, 8, 6, 4)), seed=seed).requires_grad_()


def one_block(conditioner, chunks=2, kind=revflow.AdditiveCoupling, **options):
    return revflow.ReversibleSequence([kind(conditioner)], chunks=chunks, **options).double()


class InSlices(nn.Module):
    """A conditioner that runs in slices by itself: what ordinary autograd is to be compared with."""

    def __init__(self, conditioner, chunks):
        super().__init__()
        self.conditioner, self.chunks = conditioner, chunks

    def forward(self, x, **context):
        parts = []
        for rows in x.split(-(-len(x) // self.chunks)):
            begin = sum(len(p[0]) for p in parts)
            cut = {
                k: c[begin : begin + len(rows)] if c is not None and len(c) == len(x) else c for k, c in context.items()
            }
            part = self.conditioner(rows, **cut)
            parts.append(part if isinstance(part, tuple) else (part,))
        whole = tuple(torch.cat(p) for p in zip(*parts, strict=True))
        return whole if len(whole) > 1 else whole[0]


def in_slices(net):
    """The chain of `net`, of its very modules, each conditioner of which runs in slices by itself."""
    blocks = []
    for block in net:
        if isinstance(block, revflow.Coupling):
            block = type(block)(*[InSlices(c, net.chunks) for c in (block.F, block.G) if c is not None])
        blocks.append(block)
    return revflow.ReversibleSequence(blocks).train(net.training)


def snapshot(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def values(state):
    return [value.double() for value in state.values()]


def gradients_of(y, wanted):
    return [y, *torch.autograd.grad(weighted(y), wanted, allow_unused=True)]


# What chunks may be


@pytest.mark.parametrize("chunks", [0, -1, 1.5, True, "2", None])
def test_what_chunks_may_not_be(chunks):
    with pytest.raises(ValueError, match="chunks has to be a whole number, 1 or more; got"):
        revflow.ReversibleSequence([additive()], chunks=chunks)
    with pytest.raises(ValueError, match="chunks has to be a whole number, 1 or more; got"):
        revflow.ReversibleSequence([additive()]).chunks = chunks


# Gradients


@stacks
@pytest.mark.parametrize(("size", "chunks"), [(4, 2), (5, 2), (5, 4), (2, 7), (1, 3)])
def test_any_number_of_slices(stack, size, chunks):
    """Those that divide the batch, that do not, and more than there are samples."""
    net, x = sliced(stack, chunks), batch(size, 8, 6, 4)
    assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [x])


@stacks
@sizes
def test_a_tuple_of_streams(stack, batch):
    net, streams = sliced(stack, 3), [image(batch, 4, 6, 4, seed=k).requires_grad_() for k in range(2)]
    joined = lambda f: torch.cat(f(tuple(streams)), 1)  # noqa: E731
    assert_same_gradients(net, lambda: joined(net), lambda: joined(net.plain), streams)


@stacks
@sizes
def test_inverse(stack, batch):
    net = sliced(stack, 3)
    y = net.plain(image(batch, 8, 6, 4)).detach().requires_grad_()
    assert_same_gradients(net, lambda: net.inverse(y), lambda: plain_inverse(net, y), [y])


@stacks
@pytest.mark.parametrize("what", ["both", "log_det", "output"])
def test_log_determinants(stack, what):
    net, x = sliced(stack, 2), batch()

    def run():
        y, log_det = net.forward_with_log_det(x)
        y, log_det = y.flatten(1), log_det[:, None]
        parts = {"both": (y, log_det), "log_det": (log_det, 0 * y), "output": (y,)}
        return torch.cat(parts[what], 1)

    def plain():
        with revflow.ordinary_autograd():
            return run()

    assert_same_gradients(net, run, plain, [x])


def test_log_determinants_of_the_inverse():
    net = sliced(mixed, 2)
    x, results = net.plain(batch()).detach().requires_grad_(), []
    for mode in (torch.enable_grad, revflow.ordinary_autograd):
        with mode():
            y, log_det = net._run(x, {}, inverse=True, log_det=True)
        results.append([y, log_det, *torch.autograd.grad(weighted(y) + weighted(log_det), [x, *net.parameters()])])
    assert_close(*results)


@stacks
@pytest.mark.parametrize("chunks", [2, 5])
def test_an_empty_batch(stack, chunks):
    net, x = sliced(stack, chunks), torch.zeros(0, 8, 6, 4, dtype=torch.float64, requires_grad=True)
    y, log_det = net.forward_with_log_det(x)
    assert y.shape == net.plain(x).shape and log_det.shape == (0,)
    (y.sum() + log_det.sum()).backward()
    assert x.grad.shape == x.shape
    assert all(not p.grad.any() for p in net.parameters() if p.grad is not None)


@few_stacks
def test_frozen_parameters(stack):
    """Single ones, whole blocks, and those in front; with inputs that need a gradient, and that do not."""
    net = sliced(stack, 3)
    for needs in (True, False):
        x = batch().detach().requires_grad_(needs)
        wanted = [x] if needs else []
        net.requires_grad_(True)
        for c in conditioners(net)[::2]:
            c.first.weight.requires_grad_(False)
        assert_same_gradients(net, lambda x=x: net(x), lambda x=x: net.plain(x), wanted)
        net[1].requires_grad_(False)
        assert_same_gradients(net, lambda x=x: net(x), lambda x=x: net.plain(x), wanted)
        net[:2].requires_grad_(False)
        assert_same_gradients(net, lambda x=x: net(x), lambda x=x: net.plain(x), wanted)
    net.requires_grad_(False)
    x = batch()
    assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [x])
    assert not net(x.detach()).requires_grad


@stacks
def test_leading_blocks_that_are_frozen_are_not_rewound(stack):
    net, x = sliced(stack, 5), image(BATCH, 8, 6, 4)
    net(batch()).sum().backward()  # the first time more is evaluated, to find whether samples mix
    net[:2].requires_grad_(False)
    counts = evaluations(net, lambda: net(x).sum().backward())
    assert all(n == 5 for block in counts[:2] for n in block)
    assert all(n == 10 for block in counts[2:] for n in block)


@stacks
def test_one_stream_without_a_gradient(stack):
    net, streams = sliced(stack, 2), (image(BATCH, 4, 6, 4), image(BATCH, 4, 6, 4, seed=2).requires_grad_())
    joined = lambda f: torch.cat(f(streams), 1)  # noqa: E731
    assert_same_gradients(net, lambda: joined(net), lambda: joined(net.plain), [streams[1]])


@stacks
@pytest.mark.parametrize("k", [0, 1])
def test_a_loss_of_one_stream(stack, k):
    """The other's gradient is None at first."""
    net, streams = sliced(stack, 2), tuple(image(BATCH, 4, 6, 4, seed=s).requires_grad_() for s in range(2))
    assert_same_gradients(net, lambda: net(streams)[k], lambda: net.plain(streams)[k], list(streams))


@stacks
def test_partial_gradients_and_two_backward_passes(stack):
    net, x = sliced(stack, 3), batch()
    for wanted in ([x], [*net[-1].parameters()] or [x], [next(net.parameters()), x], [*net.parameters()]):
        expected = torch.autograd.grad(weighted(net.plain(x)), wanted)
        loss = weighted(net(x))
        for _ in range(2):
            assert_close(torch.autograd.grad(loss, wanted, retain_graph=True), expected)
        assert_close(torch.autograd.grad(loss, wanted), expected)


@pytest.mark.parametrize("chunks", [1, 2])
def test_what_is_kept_is_not_overwritten(chunks):
    """A gated block's anchor, by the block before it, which undoes itself in place: a second backward needs it."""
    torch.manual_seed(0)
    blocks = [additive_two(), gated(), additive_two(), gated_two(), additive_two()]
    net, x = revflow.ReversibleSequence(blocks, chunks=chunks).double(), batch()
    before, wanted = x.detach().clone(), [x, *net.parameters()]
    expected = torch.autograd.grad(weighted(net.plain(x)), wanted)
    y = net(x)
    output = y.detach().clone()
    for _ in range(3):
        assert_close(torch.autograd.grad(weighted(y), wanted, retain_graph=True), expected)
    assert torch.equal(x, before) and torch.equal(y, output)
    streams = x.detach().chunk(2, 1)
    given, seen = [s.clone().requires_grad_() for s in streams], []
    for block in net:
        block.register_forward_hook(lambda m, args, out: seen.extend(out))
    ys = net(tuple(given))
    between, output = [s.detach().clone() for s in seen], [s.detach().clone() for s in ys]
    for _ in range(2):
        sum(map(weighted, ys)).backward(retain_graph=True)
    assert all(map(torch.equal, given, streams)) and all(map(torch.equal, ys, output))
    assert all(map(torch.equal, seen, between))


def test_accumulated_gradients():
    net, xs = sliced(mixed), [image(BATCH, 8, 6, 4, seed=k) for k in range(3)]
    plain = copy.deepcopy(net)
    for run in (net, plain.plain):
        for x in xs:
            weighted(run(x)).backward()
        sum(weighted(run(x)) for x in xs).backward()
    assert_close([p.grad for p in net.parameters()], [p.grad for p in plain.parameters()])


def test_hooks_see_a_whole_gradient_once():
    net, x, seen = sliced(mixed, 5), batch(), []
    for p in net.parameters():
        p.register_hook(lambda g: (seen.append(g), 2 * g)[1])
    found = torch.autograd.grad(weighted(net(x)), [*net.parameters()])
    assert len(seen) == len(found)
    expected = torch.autograd.grad(weighted(net.plain(x)), [*net.parameters()])
    assert_close(found, expected)


@few_stacks
def test_channels_last_and_other_layouts(stack):
    net, x = sliced(stack, 2), image(BATCH, 8, 6, 4)
    for other in (
        x.to(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        image(2 * BATCH, 8, 6, 8)[::2, :, :, 1::2],
        image(1, 8, 6, 4).expand(BATCH, -1, -1, -1),
        image(8, 6, 4, BATCH).permute(3, 0, 1, 2),
    ):
        assert other.shape == x.shape
        leaf = other.detach().requires_grad_()
        assert_same_gradients(net, lambda leaf=leaf: net(leaf), lambda leaf=leaf: net.plain(leaf), [leaf])
    weights_last = net.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    assert_same_gradients(net, lambda: weights_last(x), lambda: net.plain(x), [x])


@few_stacks
@pytest.mark.parametrize("chunks", [2, 5])
def test_both_evaluations_see_the_same_strides(stack, chunks):
    net, given, again = sliced(stack, chunks), [], []
    for x in (
        image(BATCH, 8, 6, 4).to(memory_format=torch.channels_last),
        image(8, 6, 4, BATCH).permute(3, 0, 1, 2),
        image(BATCH, 8, 4, 6).transpose(2, 3),
    ):
        net(x).sum().backward()
        hooks = [
            c.register_forward_pre_hook(
                lambda m, args: (again if revflow.is_recomputing() else given).append(
                    (m, args[0].shape, args[0].stride())
                )
            )
            for c in conditioners(net)
        ]
        net(x).sum().backward()
        for hook in hooks:
            hook.remove()
    assert len(given) == len(again)
    for c in conditioners(net):
        assert [g[1:] for g in given if g[0] is c] == [a[1:] for a in again if a[0] is c]


@stacks
def test_autocast(stack):
    """As near to float32 as ordinary autograd is, and the same values as in slices by itself."""
    net, x = sliced(stack, 2).float(), batch().detach().float().requires_grad_()
    wanted = [x, *net.parameters()]
    results = []
    for run in (net, in_slices(net).plain):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            y = run(x)
        results.append(gradients_of(y, wanted))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-6)
    assert max(map(relative_error, *results)) < 0.02


@pytest.mark.parametrize("make", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"])
def test_copies(make):
    net, x = sliced(mixed, 3), batch()
    net(x).sum().backward()
    twin = make(net)
    assert twin.chunks == 3 and "chunks=3" in repr(twin)
    assert evaluations(twin, lambda: twin(x).sum().backward())[0] == [6]
    assert_same_gradients(twin, lambda: twin(x), lambda: twin.plain(x), [x])


def test_parts_and_sums_are_sliced_too():
    net = sliced(of_one(additive), 3)
    assert (net[1:].chunks, (net + net).chunks, (net * 2).chunks) == (3, 3, 3)


def test_the_state_dict_knows_nothing_of_slices():
    net, twin, x = sliced(mixed, 3), network(mixed), batch()
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    twin.load_state_dict(torch.load(file))
    torch.testing.assert_close(net(x), twin(x))


def test_streams_have_one_batch():
    net = sliced(of_one(additive))
    with pytest.raises(
        ValueError, match=r"block 0 .*first dimension.*batch of every stream; got \(3, 4, 6, 4\), \(2, 4"
    ):
        net((image(3, 4, 6, 4).requires_grad_(), image(2, 4, 6, 4)))
    with pytest.raises(ValueError, match=r"block 0 .*first dimension, which has to be the batch"):
        net((torch.zeros((), requires_grad=True), image(2, 4, 6, 4)))


# Context


def per_sample(seed=5, size=BATCH):
    return image(size, 6, 1, 1, seed=seed).requires_grad_()


CONTEXTS = {
    "one a sample": per_sample,
    "one for all": lambda: per_sample(size=1),
    "one number": lambda: image(1, seed=5)[0].detach().requires_grad_(),
}


@few_stacks
@pytest.mark.parametrize("kind", CONTEXTS)
@pytest.mark.parametrize("leaf", ["leaf", "not a leaf", "without gradient"])
def test_context(stack, kind, leaf):
    net, x, c = sliced(stack, 2), batch(), CONTEXTS[kind]()
    context = {"leaf": lambda: c, "not a leaf": lambda: c.sin(), "without gradient": lambda: c.detach()}[leaf]
    wanted = [x] if leaf == "without gradient" else [x, c]
    for size in (BATCH, 1):
        if size == 1 and kind == "one a sample":
            continue
        x = batch(size, 8, 6, 4)
        wanted[0] = x
        assert_same_gradients(
            net, lambda x=x: net(x, condition=context()), lambda x=x: net.plain(x, condition=context()), wanted
        )


@stacks
def test_context_of_the_inverse_and_of_log_determinants(stack):
    net, c = sliced(stack, 2), per_sample()
    y = net.plain(image(BATCH, 8, 6, 4), condition=c).detach().requires_grad_()
    assert_same_gradients(net, lambda: net.inverse(y, condition=c), lambda: plain_inverse(net, y, condition=c), [y, c])
    x, results = batch(), []
    for mode in (torch.enable_grad, revflow.ordinary_autograd):
        with mode():
            z, log_det = net.forward_with_log_det(x, condition=c)
        results.append([z, log_det, *torch.autograd.grad(weighted(z) + weighted(log_det), [x, c])])
    assert_close(*results)


@stacks
def test_the_context_alone_needs_a_gradient(stack):
    net, x, c = sliced(stack, 2).requires_grad_(False), image(BATCH, 8, 6, 4), per_sample()
    assert_same_gradients(net, lambda: net(x, condition=c), lambda: net.plain(x, condition=c), [c])


class Reading(nn.Module):
    """Has `conditioner` use what `read` finds in the keyword arguments."""

    def __init__(self, conditioner, read):
        super().__init__()
        self.conditioner, self.read = conditioner, read

    def forward(self, x, **context):
        return self.conditioner(x, condition=self.read(**context))


def test_trees_of_context():
    """Of tensors and other things; one a sample, one for all, and whole numbers."""
    a, b, number, labels = per_sample(5), per_sample(6, size=1), torch.tensor(2.0), torch.arange(BATCH)
    table = nn.Embedding(BATCH, 6).double()

    def read(tree, name, power):
        assert name == "sin" and isinstance(tree["list"], list) and tree["list"][2] is None
        label = table.weight.detach()[tree["more"]["labels"]][:, :, None, None]
        return tree["list"][0].sin() * tree["list"][1] ** power * tree["more"]["number"] + label

    net, x = sliced(mixed, 2), batch()
    for block in net:
        for name in ("F", "G"):
            if getattr(block, name, None) is not None:
                setattr(block, name, Reading(getattr(block, name), read))
    tree = {"list": [a, b, None], "more": {"number": number, "labels": labels}}
    context = {"tree": tree, "name": "sin", "power": 2}
    assert_same_gradients(net, lambda: net(x, **context), lambda: net.plain(x, **context), [x, a, b])
    assert tree["list"][0] is a and tree["more"]["labels"] is labels


def test_context_of_another_size_is_refused():
    for size in (2, BATCH + 1, 0):
        net = sliced(mixed)
        with pytest.raises(
            ValueError, match=rf"block 0 \(AdditiveCoupling\).*one entry a sample \(5\).*\({size}, 6, 1, 1\)"
        ):
            net(batch(), condition=per_sample(size=size))
    with torch.no_grad(), pytest.raises(RuntimeError, match="size"):
        sliced(mixed)(batch(), condition=per_sample(size=2))


def test_whole_blocks_see_whole_context():
    class Shift(Scale):
        def forward(self, *streams, by):
            assert len(by) == 3
            return tuple(s + by.sum() for s in streams)

        def inverse(self, *streams, by):
            return tuple(s - by.sum() for s in streams)

    net, x, by = revflow.ReversibleSequence([Shift()], chunks=2).double(), batch(), image(3).requires_grad_()
    results = [gradients_of(run(x, by=by), [x, by]) for run in (net, net.plain)]
    assert_close(*results)


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


class Norms(nn.Module):
    """(x) -> one tensor, through a norm between two convolutions."""

    def __init__(self, norm):
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(4, 4, 3, padding=1), norm, nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.last(nn.functional.silu(self.norm(self.first(x))))


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


# Samples that see each other


class Mixer(nn.Module):
    """Through `mix`, of the input or of the condition; the last layer begins at zero on demand."""

    def __init__(self, mix, of="input", zero=False, outputs=1):
        super().__init__()
        self.first, self.last = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4 * outputs, 1)
        self.mix, self.of, self.outputs = mix, of, outputs
        if zero:
            nn.init.zeros_(self.last.weight)
            nn.init.zeros_(self.last.bias)

    def forward(self, x, condition=None):
        hidden = self.first(x)
        if self.of == "condition":
            condition = self.mix(condition)
        else:
            hidden = self.mix(hidden)
        if condition is not None:
            hidden = hidden * condition
        out = self.last(hidden.tanh())
        return out if self.outputs == 1 else out.chunk(self.outputs, 1)


def minus_the_mean(h):
    return h - h.mean(0)


def attention(h):
    rows = h.flatten(1)
    return (torch.softmax(rows @ rows.T / rows.shape[1], 1) @ rows).view_as(h)


def dropout(h):
    return nn.functional.dropout(h, 0.5)


MIXING = {"mean": minus_the_mean, "attention": attention, "roll": lambda h: h.roll(1, 0)}
mixing = pytest.mark.parametrize("mix", MIXING.values(), ids=MIXING)
REFUSAL = r"block 0 \(\w+\).*chunks=2: the conditioner Mixer mixes the samples of a batch"


@mixing
@pytest.mark.parametrize("kind", [revflow.AdditiveCoupling, revflow.AffineCoupling, revflow.GatedCoupling])
def test_a_conditioner_that_mixes_is_refused(mix, kind):
    net = one_block(Mixer(mix, outputs=len(kind.coefficients)), kind=kind)
    for _ in range(2):
        for run in (net, net.inverse, net.forward_with_log_det):
            with pytest.raises(ValueError, match=REFUSAL):
                run(batch())
    with torch.no_grad():
        net(batch())
    with revflow.ordinary_autograd():
        net(batch()).sum().backward()


@mixing
@pytest.mark.parametrize("drop", [False, True])
def test_the_second_conditioner_and_dropout_do_not_hide_it(mix, drop):
    torch.manual_seed(0)
    conditioner = Mixer((lambda h: mix(dropout(h))) if drop else mix)
    net = revflow.ReversibleSequence([additive(), revflow.AdditiveCoupling(Conditioner(4), conditioner)], chunks=2)
    with pytest.raises(ValueError, match=r"block 1 .*conditioner Mixer mixes"):
        net.double()(batch())


@pytest.mark.parametrize("mix", [minus_the_mean, lambda c: c - c.mean(0, keepdim=True)])
def test_a_conditioner_that_mixes_its_context_is_refused(mix):
    net = one_block(Mixer(mix, of="condition"))
    with pytest.raises(ValueError, match=REFUSAL):
        net(batch(), condition=per_sample())


def test_a_conditioner_that_reads_one_context_for_all():
    net, c = one_block(Mixer(lambda c: c.mean(0, keepdim=True), of="condition")), per_sample(size=1)
    x = batch()
    assert_same_gradients(net, lambda: net(x, condition=c), lambda: net.plain(x, condition=c), [x, c])


@mixing
def test_a_conditioner_that_begins_at_zero_is_looked_at_again(mix):
    net = one_block(Mixer(mix, zero=True))
    net(batch()).sum().backward()
    nn.init.normal_(net[0].F.last.weight)
    with pytest.raises(ValueError, match=REFUSAL):
        net(batch())


def test_a_conditioner_that_mixes_in_train_mode_alone_is_refused_there():
    class InTraining(Mixer):
        def forward(self, x):
            self.mix = minus_the_mean if self.training else torch.tanh
            return super().forward(x)

    net = one_block(InTraining(None)).eval()
    net(batch()).sum().backward()
    with pytest.raises(ValueError, match=r"the conditioner InTraining mixes"):
        net.train()(batch())


def test_an_error_while_it_is_looked_at_is_not_the_last_word():
    class Failing(Mixer):
        fails = True

        def forward(self, x):
            if self.fails:
                raise RuntimeError("out of order")
            return super().forward(x)

    net = one_block(Failing(minus_the_mean))
    with pytest.raises(RuntimeError, match=r"block 0 .*out of order"):
        net(batch())
    net[0].F.fails = False
    with pytest.raises(ValueError, match="the conditioner Failing mixes"):
        net(batch())


@mixing
def test_it_is_not_looked_for_without_a_guard(mix):
    """guard="off" is at the user's own risk: the function is that of slices."""
    net, x = one_block(Mixer(mix), guard="off"), batch()
    assert_close(*[gradients_of(run(x), [x, *net.parameters()]) for run in (net, in_slices(net).plain)])
    assert relative_error(net(x), net.plain(x)) > 1e-3


class Wandering(nn.Module):
    """Draws, and counts what it has seen in its buffers, which it also uses."""

    def __init__(self):
        super().__init__()
        self.conditioner = Conditioner(4, dropout=0.5)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("latest", torch.zeros(4, 1, 1))

    def forward(self, x):
        self.seen = self.seen + 1
        out = self.conditioner(x) * self.seen + self.latest
        self.latest = self.latest * 0.5 + torch.rand(4, 1, 1, dtype=x.dtype)
        return out + torch.rand(len(x), 1, 1, 1, dtype=x.dtype)


@pytest.mark.parametrize("kind", ["normal", "guard off"])
def test_looking_leaves_everything_as_it_was(kind):
    """Not refused: what differs is drawn, or comes from buffers, not from other samples."""
    torch.manual_seed(0)
    blocks = [revflow.AdditiveCoupling(Wandering(), Wandering()), additive(dropout=0.5)]
    net = revflow.ReversibleSequence(blocks, chunks=2, guard="off" if kind == "guard off" else "warn").double()
    x, start, python = batch(), snapshot(net), random.getstate()
    results = []
    for run in (in_slices(net).plain, net, net):
        net.load_state_dict(start)
        torch.manual_seed(7)
        found = [run(x)]
        state = torch.get_rng_state()
        results.append([*gradients_of(*found, [x, *net.parameters()]), *values(snapshot(net)), state.double()])
    for k in (1, 2):
        assert_close(results[k], results[0])
    assert net[0].F.seen == 2 and random.getstate() == python


@pytest.mark.parametrize("value", [0.0, 0.5, 1e30])
def test_a_batch_of_equal_samples(value):
    """Of which nothing can be told is let through; and nothing is refused without a reason."""
    net, x = (
        one_block(Conditioner(4, norm=False)),
        torch.full((4, 8, 6, 4), value, dtype=torch.float64, requires_grad=True),
    )
    net(x).sum().backward()


def test_the_first_batch_of_one_sample_is_not_the_last_word():
    net = one_block(Mixer(minus_the_mean))
    net(batch(1, 8, 6, 4)).sum().backward()
    with pytest.raises(ValueError, match=REFUSAL):
        net(batch())


@pytest.mark.parametrize("grad", [True, False])
def test_looking_leaves_the_grad_mode_as_it_was(grad):
    net = sliced(of_one(additive))
    with torch.set_grad_enabled(grad):
        net(batch())
        assert torch.is_grad_enabled() == grad and not revflow.is_recomputing()


# Exact arithmetic


@exact_stacks
@pytest.mark.parametrize("low", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_exact(stack, low, inverse):
    """What is rebuilt is what was there, to the last bit; gradients are near."""
    net, x = exact_network(stack), frames(BATCH, 8, 6, 4)
    x = (net.plain(x) if inverse else x).detach().requires_grad_()
    net.chunks = 2
    function = net.inverse if inverse else net
    wanted = [x, *net.parameters()]
    with torch.autocast("cpu", torch.bfloat16, enabled=low, cache_enabled=False):
        function(x).sum().backward()
        given, again = watch(net)
        found = gradients_of(function(x), wanted)
        assert len(given) == 2 * len(conditioners(net)) == len(again)
        pairs = [pair for k in range(0, len(again), 2) for pair in reversed(again[k : k + 2])]
        assert_equal([a for args in given for a in args], [a for args in reversed(pairs) for a in args])
        oracle = in_slices(net)
        plain = revflow.ReversibleSequence(oracle, exact=True)
        with revflow.ordinary_autograd():
            expected = gradients_of((plain.inverse if inverse else plain)(x), wanted)
    assert_equal(found[:1], expected[:1])
    assert_close(found[1:], expected[1:], 0.02 if low else 1e-5)
    if not (low or inverse):
        assert_close(found, gradients_of(net.plain(x), wanted), 1e-5)


def test_exact_residuals_of_slices():
    """Two tensors a slice; and gates that shut, whose values are kept whole."""
    torch.manual_seed(0)
    blocks = [gated(4), affine(4), gated_two(4)]
    for block in blocks:
        for conditioner in block.children():
            conditioner.register_forward_hook(lambda m, args, out: (20 * torch.tanh(4 * out[0]), out[1].tanh()))
    net, x = (
        revflow.ReversibleSequence([blocks[0], blocks[2]], exact=True, chunks=3),
        frames(BATCH, 8, 6, 4).requires_grad_(),
    )
    net(x).sum().backward()
    given, again = watch(net)
    y = net(x)
    torch.autograd.grad(y.sum(), x, retain_graph=True)
    first = [*again]
    again.clear()
    torch.autograd.grad(y.sum(), x)
    assert_equal([a for (a,) in again], [a for (a,) in first])
    for k in range(0, len(given), 3):
        rows = torch.cat([a for (a,) in given[k : k + 3]])
        end = len(again) - k
        assert_equal([torch.cat([a for (a,) in again[end - 3 : end]])], [rows])


# Memory


def kept(net, x, **context):
    return revflow.measure_memory(lambda: net(x, **context)).kept


@pytest.mark.parametrize("chunks", [2, 3])
def test_what_is_kept_between_forward_and_backward(chunks):
    x = image(8, 8, 6, 4)
    for depth in (2, 8):
        for make, more in ((additive, 0), (additive_two, 0), (affine, 0), (gated, depth), (gated_two, 2 * depth)):
            torch.manual_seed(0)
            net = revflow.ReversibleSequence([make() for _ in range(depth)], chunks=chunks, guard="off").double()
            assert kept(net, x) == (2 + more) * x.nbytes // 2
            assert revflow.measure_memory(lambda net=net: net.inverse(x)).kept == x.nbytes


@couplings
def test_a_training_step_leaves_nothing(make):
    net, x, c = sliced(of_one(make), 3, dropout=0.3), image(BATCH, 8, 6, 4), per_sample()

    def step():
        net(x, condition=c).sum().backward()
        net.zero_grad()
        c.grad = None

    step()
    assert revflow.measure_memory(step).kept == 0


HIDDEN = 4


def wide(kind, count, chunks, outputs):
    """Conditioners whose activations are `HIDDEN` times a stream, twice."""
    torch.manual_seed(0)
    return revflow.ReversibleSequence(
        [kind(*[Wide(outputs) for _ in range(count)]) for _ in range(3)],
        chunks=chunks,
        guard="off",
    )


class Wide(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.first, self.last = nn.Conv2d(8, 8 * HIDDEN, 1), nn.Conv2d(8 * HIDDEN, 8 * outputs, 1)
        self.outputs = outputs

    def forward(self, x):
        out = self.last(nn.functional.silu(self.first(x)))
        return out if self.outputs == 1 else out.chunk(self.outputs, 1)


def peak(net, x):
    """Of the chain alone: the output's gradient is given, and nobody holds the output."""
    seed = torch.randn_like(x)
    x = x.requires_grad_()
    for leaf in (x, *net.parameters()):
        leaf.grad = torch.zeros_like(leaf)

    def step():
        y = net(x)
        edge = torch.autograd.graph.get_gradient_edge(y)
        del y
        torch.autograd.backward([edge], [seed])

    return revflow.measure_memory(step).peak


@pytest.mark.parametrize(
    ("kind", "count", "streams"),
    [
        (revflow.AdditiveCoupling, 1, {2: 11.5, 16: 5.8125}),
        (revflow.AdditiveCoupling, 2, {2: 12.5, 16: 6.8125}),
        (revflow.AffineCoupling, 1, {2: 14, 16: 7}),
        (revflow.AffineCoupling, 2, {2: 16, 16: 9}),
        (revflow.GatedCoupling, 1, {2: 15.5, 16: 8.9375}),
    ],
)
def test_the_peak_falls_with_the_number_of_slices(kind, count, streams):
    """Of a slice is what a conditioner has for itself, its graph and the gradients in that: 12 streams or more of all samples."""
    x, outputs = image(16, 16, 16, 16, dtype=torch.float32), len(kind.coefficients)
    for chunks, expected in streams.items():
        net = wide(kind, count, chunks, outputs)
        its_gradients = sum(p.nbytes for p in net[0].F.parameters())
        assert 0 <= peak(net, x) - expected * x.nbytes / 2 <= 6 * its_gradients


# With a memory budget


@pytest.fixture
def keep_from(monkeypatch):
    """keep_from(k) makes every sequence with a budget keep its blocks from the number k on, once it has measured."""
    return lambda k: monkeypatch.setattr(Budget, "_first_kept", lambda self, table, limit: k)


@few_stacks
def test_kept_blocks_run_whole_and_once(stack, keep_from):
    net, x, c = sliced(stack, 5), batch(), per_sample()
    net.memory_budget = 2**40
    run = lambda: net(x, condition=c)  # noqa: E731
    run()
    for k in range(len(net), -1, -1):
        keep_from(k)
        found = evaluations(net, lambda: run().sum().backward())
        assert all(n == 10 for block in found[:k] for n in block), k
        assert all(n == 1 for block in found[k:] for n in block), k
        assert_same_gradients(net, run, lambda: net.plain(x, condition=c), [x, c])


def test_batch_norm_behind_what_is_rebuilt(keep_from):
    """A step that measures rebuilds every block: refused there, and where it is rebuilt."""
    torch.manual_seed(0)
    net = revflow.ReversibleSequence(
        [additive(), revflow.AdditiveCoupling(Norms(nn.BatchNorm2d(4)))], chunks=2
    ).double()
    net.memory_budget = "1GiB"
    with pytest.raises(ValueError, match=r"block 1 .*mixes the samples"):
        net(batch())
    net.memory_budget = "all"
    net(batch()).sum().backward()


@couplings
@pytest.mark.parametrize("guard", ["off", "warn"])
def test_a_first_step_measures_as_a_plan_does(make, guard):
    """Also where it looks for mixed samples on the way."""
    torch.manual_seed(0)
    net = revflow.ReversibleSequence([make() for _ in range(3)], guard=guard, chunks=2, memory_budget="1GiB").double()
    x = image(4, 8, 12, 12).requires_grad_()
    net(x).sum().backward()
    ((_, table),) = net._budget._known.values()
    assert table.costs == net.plan(x).costs
    assert all(cost.graph > 0 for cost in table.costs)


def test_other_chunks_are_measured_anew():
    net, x = sliced(of_one(additive), 2), batch()
    net.memory_budget = "1GiB"
    net(x).sum().backward()
    for chunks in (3, 5):
        net.chunks = chunks
        for expected in (2 * chunks, 1):  # measured, kept
            assert evaluations(net, lambda: net(x).sum().backward()) == [[expected]] * 3


@pytest.mark.parametrize("make", [additive_two, affine, gated], ids=lambda m: m.__name__)
@pytest.mark.parametrize("chunks", [2, 16])
def test_no_budget_is_exceeded_by_more_than_a_transient(make, chunks):
    torch.manual_seed(0)
    net = revflow.ReversibleSequence([make() for _ in range(5)], guard="off", chunks=chunks).double()
    x, stream = image(4, 8, 12, 12), 4 * 4 * 12 * 12 * 8
    net.memory_budget = "none"
    none = peak(net, x)
    with revflow.ordinary_autograd():
        plain = peak(net, x)
    least, schedules = net.plan(x).peak, set()
    for share in (0.0, 0.6, 1.2):
        net.memory_budget = budget = int(max(none, least) + share * (plain - none))
        net(x).sum().backward()
        plan, found = net.plan(x), peak(net, x)
        schedules.add(plan.kept)
        assert plan.peak <= budget
        assert found <= budget + plan.transient
        assert abs(found - plan.peak) <= 3 * stream
    assert {5} < schedules


def test_blocks_that_are_not_sliced_cost_what_they_cost():
    """Of their gradient; and a batch has no more slices than samples."""

    class Whole(Scale):
        def forward(self, *streams):
            return tuple((s * self.log_scale.exp()).clone() for s in streams)

    x = image(2, 8, 6, 4)
    costs = []
    for chunks in (1, 2, 50):
        torch.manual_seed(0)
        net = revflow.ReversibleSequence([Whole(), additive()], guard="off", chunks=chunks).double()
        costs.append(net.plan(x).costs)
    for whole, sliced_in_two, in_fifty in zip(*costs, strict=True):
        assert sliced_in_two == in_fifty
        assert whole.gradient == sliced_in_two.gradient
    assert costs[0][0] == costs[1][0]
