"""chunks: conditioners that are rerun see the batch in slices, and everything else is as without them.

Where something is drawn or moved, the oracle is ordinary autograd through the same conditioners in the same slices.
"""

import copy
import io
import pickle

import pytest
import torch

import revflow
from engine.nets import (
    additive,
    additive_two,
    assert_close,
    assert_same_gradients,
    conditioners,
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
from engine.slices import BATCH, batch, few_stacks, gradients_of, in_slices, sizes, sliced
from revflow._rewind.direction import INVERSE


@pytest.mark.parametrize("chunks", [0, -1, 1.5, True, "2", None])
def test_what_chunks_may_not_be(chunks):
    with pytest.raises(ValueError, match="chunks must be a whole number of at least 1; got"):
        revflow.ReversibleSequence([additive()], chunks=chunks)
    with pytest.raises(ValueError, match="chunks must be a whole number of at least 1; got"):
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
            y, log_det = net._run(x, {}, INVERSE, log_det=True)
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
    twin(x).sum().backward()  # a copy looks at its own modules whether they mix samples
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
    with pytest.raises(ValueError, match=r"block 0 .*first dimension, which must be the batch"):
        net((torch.zeros((), requires_grad=True), image(2, 4, 6, 4)))
