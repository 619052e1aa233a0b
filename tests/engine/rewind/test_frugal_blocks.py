"""As test_frugal, with blocks and streams of all kinds: whose inverse returns what it holds, which share their values."""

import pytest
import torch
from torch import nn

import revflow
from engine.exactly import assert_equal
from engine.held import Held, chains, exactly, gradients, network, of, streams
from engine.nets import Conditioner, additive, additive_two, assert_close, assert_same_gradients, image, weighted
from revflow._rewind.graph import is_ours


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
        block.register_forward_hook(lambda m, args, output: held.take([t.detach() for t in (*args, *output)]))
    y = net(x)
    held.take([y])
    found = gradients(net, y, x, retain_graph=True)
    assert_close(found, expected)
    assert_equal(gradients(net, y, x), found)
    held.assert_unchanged(8)
