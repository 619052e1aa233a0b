"""The rewind overwrites its own buffers: nothing that anybody else could see is changed by it."""

import pytest
import torch
from torch import nn

import revflow
from engine.exactly import assert_equal
from engine.nets import (
    Conditioner,
    Scale,
    additive,
    additive_two,
    affine,
    affine_two,
    assert_close,
    assert_same_gradients,
    conditioners,
    gated,
    gated_two,
    image,
    weighted,
)
from revflow._graph import is_ours

# An anchor (a gated block's input) right behind blocks that add: these overwrite what follows, if they may.
CHAINS = {
    "additive": [additive] * 4,
    "additive_two": [additive_two] * 3,
    "anchors": [additive_two, gated, additive, additive, gated_two, affine],
    "mixed": [additive_two, Scale, affine_two, additive, gated],
}
chains = pytest.mark.parametrize("chain", CHAINS)
exactly = pytest.mark.parametrize("exact", [False, True], ids=["rebuilt", "exact"])


def network(chain, exact=False, **options):
    torch.manual_seed(0)
    made = [make() for make in CHAINS[chain] if not (exact and make is Scale)]
    return revflow.ReversibleSequence(made, exact=exact, **options).double()


def of(*blocks, **options):
    torch.manual_seed(0)
    return revflow.ReversibleSequence(blocks, **options).double()


class Held:
    """Tensors that somebody holds, and what they were."""

    def __init__(self):
        self.tensors, self.before = [], []

    def take(self, tensors):
        self.tensors += tensors
        self.before += [t.detach().clone() for t in tensors]

    def assert_unchanged(self, count=1):
        assert len(self.tensors) >= count
        assert_equal(self.tensors, self.before)


def gradients(net, output, *inputs, **options):
    loss = sum(map(weighted, output)) if isinstance(output, tuple) else weighted(output)
    return torch.autograd.grad(loss, [*inputs, *net.parameters()], **options)


def streams(*shape, count=2, grad=True):
    return tuple(image(*(shape or (2, 4, 6, 4)), seed=k).requires_grad_(grad) for k in range(count))


# What the user holds


@chains
@exactly
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", ["itself", "a view", "detached", "numpy", "data"])
def test_an_output_that_is_held(chain, exact, batch, kind):
    """With a batch of one the streams in the joined output are contiguous, as the blocks had them."""
    net, held = network(chain, exact), Held()
    takes = {
        "itself": lambda y: y,
        "a view": lambda y: y[:, 1:3],
        "detached": lambda y: y.detach(),
        "numpy": lambda y: torch.from_numpy(y.detach().numpy()),
        "data": lambda y: y.data,
    }
    x, pair = image(batch, 8, 6, 4).requires_grad_(), streams(batch, 4, 6, 4)
    given = Held()
    given.take([x, *pair])
    for inputs in (x, pair):
        y = net(inputs)
        held.take([takes[kind](s) for s in (y if isinstance(y, tuple) else (y,))])
        inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        found = gradients(net, y, *inputs, retain_graph=True)
        assert_equal(gradients(net, y, *inputs), found)
    held.assert_unchanged()
    given.assert_unchanged()


@chains
@pytest.mark.parametrize("dropped", [0, 1])
def test_one_stream_of_the_output_is_held_and_one_is_lost(chain, dropped):
    net, pair, held = network(chain), streams(), Held()
    y = net(pair)
    expected = torch.autograd.grad(weighted(net.plain(pair)[1 - dropped]), [*pair, *net.parameters()], allow_unused=True)
    kept = y[1 - dropped]
    del y
    held.take([kept])
    found = torch.autograd.grad(weighted(kept), [*pair, *net.parameters()], materialize_grads=True)
    assert_close(found, [torch.zeros_like(f) if e is None else e for f, e in zip(found, expected, strict=True)])
    held.assert_unchanged()


@chains
@exactly
@pytest.mark.parametrize("of_blocks", [True, False], ids=["blocks", "conditioners"])
@pytest.mark.parametrize("alias", [False, True], ids=["itself", "alias"])
def test_what_forward_hooks_store(chain, exact, of_blocks, alias):
    """Of both runs: inputs and outputs, as they are or detached."""
    net, x, held = network(chain, exact), image().requires_grad_(), Held()

    def hook(module, args, output):
        found = [*args, *(output if isinstance(output, tuple) else (output,))]
        held.take([f.detach() for f in found] if alias else found)

    expected = gradients(net, net.plain(x), x)
    for module in net if of_blocks else conditioners(net):
        module.register_forward_hook(hook)
    y = net(x)
    found = gradients(net, y, x, retain_graph=True)
    assert_close(found, expected)
    assert_equal(gradients(net, y, x), found)
    held.assert_unchanged(8)


@chains
@exactly
def test_what_tensor_hooks_see(chain, exact):
    net, pair, held = network(chain, exact), streams(), Held()
    y = net(pair)
    for s in (*y, *pair):
        s.register_hook(lambda gradient: held.take([gradient]))
    for c in conditioners(net):
        c.register_full_backward_hook(lambda m, into, out: held.take([g for g in (*into, *out) if g is not None]))
    gradients(net, y, *pair)
    held.assert_unchanged(4)


class Cache:
    """Saved-tensor hooks that give the same object each time, or copies of it."""

    def __init__(self, copy):
        self.held, self.copy = Held(), copy

    def pack(self, tensor):
        self.held.take([tensor if self.copy is None else self.copy(tensor)])
        return len(self.held.tensors) - 1

    def unpack(self, k):
        return self.held.tensors[k]


@chains
@exactly
@pytest.mark.parametrize("copy", [None, torch.Tensor.detach, torch.clone], ids=["itself", "alias", "copy"])
def test_hooks_for_saved_tensors(chain, exact, copy):
    net, x, cache = network(chain, exact), image().requires_grad_(), Cache(copy)
    expected = gradients(net, net.plain(x), x)
    for inside in (False, True):
        with torch.autograd.graph.saved_tensors_hooks(cache.pack, cache.unpack):
            y = net(x)
            found = gradients(net, y, x, retain_graph=True) if inside else None
        found = found or gradients(net, y, x, retain_graph=True)
        assert_close(found, expected)
        assert_equal(gradients(net, y, x), found)
    cache.held.assert_unchanged()


@chains
@exactly
def test_chains_that_share_blocks_and_inputs(chain, exact):
    """Their backward passes in turns, twice each."""
    net = network(chain, exact)
    other = revflow.ReversibleSequence(list(net)[::-1], exact=exact)
    pair, held = streams(), Held()
    graphs = [net(pair), other(pair), net.inverse(pair), net((pair[1], pair[0]))]
    plain = [net.plain(pair), other.plain(pair)]
    held.take([s for y in graphs for s in y])
    first = [gradients(net, y, *pair, retain_graph=True) for y in graphs]
    assert_equal([g for y in graphs for g in gradients(net, y, *pair)], [g for found in first for g in found])
    for found, y in zip(first, plain, strict=False):
        assert_close(found, gradients(net, y, *pair))
    held.assert_unchanged()


@chains
def test_a_backward_pass_that_failed(chain):
    """What it had overwritten by then was its own: a second one begins anew."""
    net, x, failing = network(chain), image().requires_grad_(), []
    y = net(x)
    first = conditioners(net)[0]
    handle = first.register_forward_hook(lambda *_: failing and revflow.is_recomputing() and 1 / 0)
    failing.append(True)
    with pytest.raises(ZeroDivisionError):
        gradients(net, y, x, retain_graph=True)
    handle.remove()
    assert_close(gradients(net, y, x), gradients(net, net.plain(x), x))


@chains
def test_a_partial_backward_and_then_a_whole_one(chain):
    net, x = network(chain), image().requires_grad_()
    y, expected = net(x), gradients(net, net.plain(x), x)
    for block in reversed(net):
        wanted = list(block.parameters())
        torch.autograd.grad(weighted(y), wanted, retain_graph=True)
    assert_close(gradients(net, y, x), expected)


# Blocks and streams of all kinds


class Own(nn.Module):
    """A block whose inverse returns what `change` makes of the streams; they pass through it unchanged."""

    def __init__(self, change):
        super().__init__()
        self.change, self.held = change, Held()

    def forward(self, a, b):
        return a, b

    def inverse(self, a, b):
        found = self.change(a, b)
        self.held.take(list(found))
        return found


def from_numpy(a, b):
    found = a.detach().numpy().copy(), b.detach().numpy().copy()
    return tuple(map(torch.from_numpy, found))


@pytest.mark.parametrize(
    "change",
    [
        lambda a, b: (a, b),
        lambda a, b: (a.detach(), b.detach()),
        lambda a, b: torch.cat((a, b)).chunk(2),
        lambda a, b: torch.stack((a, b), -1).unbind(-1),
        lambda a, b: tuple(torch.cat((a, b), 1).split(4, 1)),
        from_numpy,
        lambda a, b: (a.clone().data, b.clone().data),
        lambda a, b: (a.clone().transpose(2, 3).contiguous().transpose(2, 3), b),
    ],
    ids=["its inputs", "aliases", "halves", "strided", "views", "numpy", "data", "transposed"],
)
def test_inverses_that_return_what_they_hold(change):
    net, x = of(additive_two(), Own(change), additive(), additive_two(), Own(change)), image().requires_grad_()
    assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [x])
    for k in (1, 4):
        net[k].held.assert_unchanged(2)


def test_numpy_keeps_its_memory():
    """Of an array nobody but NumPy knows."""
    arrays = []

    def change(a, b):
        arrays.extend((array, array.copy()) for array in (a.detach().numpy().copy(), b.detach().numpy().copy()))
        return tuple(torch.from_numpy(array) for array, _ in arrays[-2:])

    class Fresh(Own):
        def inverse(self, a, b):
            return self.change(a, b)

    net = of(additive_two(), Fresh(change))
    net(image()).sum().backward()
    assert len(arrays) == 2
    assert all((array == before).all() for array, before in arrays)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: torch.ones(2, 3), True),
        (lambda: torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last), True),
        (lambda: torch.ones(2, 3, dtype=torch.complex64), True),
        (lambda: torch.ones(0, 3), True),
        (lambda: torch.ones(1, 3).expand(2, 3), False),
        (lambda: torch.ones(2, 3)[:1], False),
        (lambda: torch.ones(4).as_strided((2, 2), (1, 1)), False),
        (lambda: torch.from_numpy(torch.ones(2, 3).numpy().copy()), False),
    ],
    ids=["new", "channels_last", "complex", "empty", "expanded", "part", "overlapping", "numpy"],
)
@torch.no_grad()
def test_whose_a_tensor_is(make, expected):
    stream = make().detach()  # all that is left of it
    assert is_ours(stream) == expected
    alias = stream.detach()
    assert not is_ours(stream)
    assert not is_ours(alias)


class Merge(nn.Module):
    """One stream out of two, whose inverse returns views of it."""

    def forward(self, *pair):
        return (torch.cat(pair, 1),)

    def inverse(self, whole):
        return whole.chunk(2, 1)


@pytest.mark.parametrize("batch", [1, 2])
def test_an_output_of_one_stream(batch):
    net, x, held = of(additive_two(), Merge()), image(batch, 8, 6, 4).requires_grad_(), Held()
    y = net(x)
    held.take([y])
    assert_close(gradients(net, y, x, retain_graph=True), gradients(net, net.plain(x), x))
    assert_close(gradients(net, y, x), gradients(net, net.plain(x), x))
    held.assert_unchanged()



def test_swaps_and_the_same_block_twice():
    class Swap(nn.Module):
        def forward(self, a, b):
            return b, a

        inverse = forward

    block = additive_two()
    net, x = of(block, Swap(), block, Swap(), additive(), block, block), image().requires_grad_()
    assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [x])


@chains
@exactly
@pytest.mark.parametrize(
    "make",
    [
        lambda x: (x, x),
        lambda x: (x, x.detach()),
        lambda x: torch.cat((x, x + 1), 1).chunk(2, 1),
        lambda x: (x, x.flip(0).flip(0)),
        lambda x: tuple(s.to(memory_format=torch.channels_last) for s in (x, 2 * x)),
        lambda x: (x[:1].expand(2, -1, -1, -1), x),
    ],
    ids=["twice", "detached", "halves", "copy", "channels_last", "expanded"],
)
def test_streams_that_share(chain, exact, make):
    net, x, held = network(chain, exact), image(2, 4, 6, 4).requires_grad_(), Held()
    pair = make(x)
    held.take([x, *pair])
    y = net(pair)
    held.take([*y])
    assert_close(gradients(net, y, x, retain_graph=True), gradients(net, net.plain(make(x)), x))
    held.assert_unchanged()


@pytest.mark.parametrize("kind", [revflow.AdditiveCoupling, revflow.AffineCoupling, revflow.GatedCoupling])
def test_conditioners_that_return_their_input(kind):
    class Same(nn.Module):
        def forward(self, x):
            return (x,) * len(kind.coefficients)

    net = of(kind(Same()), kind(Same(), Conditioner(4, len(kind.coefficients))), kind(Same()))
    pair = tuple(0.1 * s.detach() for s in streams())
    for s in pair:
        s.requires_grad_()
    assert_close(gradients(net, net(pair), *pair), gradients(net, net.plain(pair), *pair))


def test_complex_streams():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 3, dtype=torch.complex128))

        def forward(self, x):
            return torch.tanh(x @ self.weight)

    torch.manual_seed(0)
    net = revflow.ReversibleSequence([revflow.AdditiveCoupling(Layer(), Layer()) for _ in range(3)])
    x, held = torch.randn(2, 6, dtype=torch.complex128, requires_grad=True), Held()
    y = net(x)
    held.take([torch.view_as_real(y.detach()), torch.view_as_real(x.detach())])
    found, expected = (torch.autograd.grad(s.abs().sum(), [x, *net.parameters()]) for s in (y, net.plain(x)))
    assert_close([torch.view_as_real(f) for f in found], [torch.view_as_real(e) for e in expected])
    held.assert_unchanged()


def test_streams_of_integers():
    class Whole(nn.Module):
        def forward(self, x):
            return (3 * x.detach()).round().long()

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, counts):
            return torch.tanh(self.linear(counts.double()))

    net, held = of(*[revflow.AdditiveCoupling(Layer(), Whole()) for _ in range(3)]), Held()
    x, counts = image(2, 3).requires_grad_(), torch.arange(6).view(2, 3)
    held.take([x])
    before = counts.clone()
    found, expected = (
        torch.autograd.grad(weighted(run((x, counts))[0]), [x, *net.parameters()]) for run in (net, net.plain)
    )
    assert_close(found, expected)
    assert torch.equal(counts, before)
    held.assert_unchanged()


@pytest.mark.parametrize("chunks", [2, 3])
@chains
def test_slices(chain, chunks):
    net, x, held = network(chain), image(3, 8, 6, 4).requires_grad_(), Held()
    net.chunks = chunks
    expected = gradients(net, net.plain(x), x)
    for block in net:
        block.register_forward_hook(lambda m, args, output: held.take([*args, *output]))
    y = net(x)
    held.take([y])
    found = gradients(net, y, x, retain_graph=True)
    assert_close(found, expected)
    assert_equal(gradients(net, y, x), found)
    held.assert_unchanged(8)
