"""Shapes and strides: any split, any memory format, any number of dimensions, and no sample at all."""

import pytest
import torch
from torch import nn

import revflow
from engine.nets import (
    assert_close,
    assert_same_gradients,
    conditioners,
    image,
    network,
    stacks,
)


def in_another_place(net, dim):
    """`net`, with its channels where `dim` is: each conditioner sees its stream as an image all the same."""
    if dim % 4 != 1:
        for c in conditioners(net):
            c.register_forward_pre_hook(lambda m, args: (args[0].movedim(dim, 1),))
            c.register_forward_hook(lambda m, args, out: _each(out, lambda t: t.movedim(1, dim)))
    return revflow.ReversibleSequence(net, split_dim=dim)


def _each(out, change):
    return tuple(map(change, out)) if isinstance(out, tuple) else change(out)


@stacks
@pytest.mark.parametrize("dim", [0, 1, 2, 3, -1, -2, -3, -4])
def test_any_split_dimension(stack, dim):
    net = in_another_place(network(lambda: [b for b in stack() if isinstance(b, revflow.Coupling)][:2]), dim)
    x = image(2, 8, 6, 4).movedim(1, dim).contiguous().requires_grad_()
    assert net(x).shape == x.shape
    assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [x])
    found = torch.cat(net(x.chunk(2, dim)), dim)
    assert_close([found, net.inverse(found)], [net(x), x])


@stacks
@pytest.mark.parametrize("weights_too", [True, False])
def test_channels_last_stays_channels_last(stack, weights_too):
    """In both runs of each conditioner, through changes of shape, and in what comes out."""
    net, seen = network(stack), {}
    if weights_too:
        net.to(memory_format=torch.channels_last)
    for c in conditioners(net):
        c.register_forward_hook(lambda m, args, out: seen.setdefault(m, []).append(args[0].stride()))
    x = image().to(memory_format=torch.channels_last).requires_grad_()
    y = net(x)
    if weights_too:
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert all(strides[0][1] == 1 for strides in seen.values())
    y.square().sum().backward()
    assert all(first == second for first, second in seen.values())
    assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [x])


@stacks
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: x.repeat_interleave(2, 3)[..., ::2],
        lambda x: x[:1].expand(3, -1, -1, -1),
        lambda x: x[:, :1].expand(-1, 8, -1, -1),
        lambda x: x.flip(1).movedim(1, 3).contiguous().movedim(3, 1)[:, :, :, :],
        lambda x: x.as_strided((2, 8, 6, 4), (96, 12, 2, 1)),
    ],
    ids=["transposed", "strided", "expanded batch", "expanded channels", "moved", "overlapping"],
)
def test_inputs_of_other_strides(stack, change):
    net, x = network(stack), image().requires_grad_()
    assert_same_gradients(net, lambda: net(change(x)), lambda: net.plain(change(x)), [x])
    streams = lambda f: lambda: torch.cat(f(change(x).chunk(2, 1)), 1)  # noqa: E731
    assert_same_gradients(net, streams(net), streams(net.plain), [x])


@stacks
def test_a_conditioner_that_returns_strange_strides(stack):
    """Both runs see the same input strides whatever came before."""
    net, x, seen = network(stack), image().requires_grad_(), {}
    for c in conditioners(net):
        c.register_forward_pre_hook(lambda m, args: seen.setdefault(m, []).append(args[0].stride()))
        c.register_forward_hook(lambda m, args, out: _each(out, lambda t: t.mT.contiguous().mT))
    net(x).sum().backward()
    assert all(first == second for first, second in seen.values())
    assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [x])


@stacks
def test_empty_batch(stack):
    net, x = network(stack), image(0, 8, 6, 4).requires_grad_()
    assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [x])
    net(x).sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad.count_nonzero() == 0 for p in net.parameters())
    assert net.inverse(net(x)).shape == x.shape


@stacks
def test_one_sample_then_many(stack):
    """The shapes of one call do not bind the next."""
    net = network(stack)
    for shape in ((1, 8, 2, 2), (5, 8, 4, 6), (2, 8, 6, 4)):
        x = image(*shape).requires_grad_()
        assert_same_gradients(net, lambda x=x: net(x), lambda x=x: net.plain(x), [x])


KINDS = {
    "additive": (revflow.AdditiveCoupling, 1),
    "affine": (revflow.AffineCoupling, 2),
    "gated": (revflow.GatedCoupling, 2),
}
kinds = pytest.mark.parametrize("kind", KINDS)
one_and_two = pytest.mark.parametrize("count", [1, 2])


class Split(nn.Module):
    """What `module` returns, in as many coefficients as a coupling wants."""

    def __init__(self, module, outputs, dim):
        super().__init__()
        self.module, self.outputs, self.dim = module, outputs, dim

    def forward(self, x):
        out = self.module(x)
        return out if self.outputs == 1 else out.chunk(self.outputs, self.dim)


def chain(kind, count, conditioner, dim, depth=3):
    """`conditioner(k, outputs)` makes the k-th block's conditioner, with that many times its input's features."""
    torch.manual_seed(0)
    coupling, outputs = KINDS[kind]
    blocks = [coupling(*[Split(conditioner(k, outputs), outputs, dim) for _ in range(count)]) for k in range(depth)]
    return revflow.ReversibleSequence(blocks, split_dim=dim).double()


@kinds
@one_and_two
@pytest.mark.parametrize("dimensions", [0, 1, 2, 3])
def test_conditioners_of_any_dimensions(kind, count, dimensions):
    make = [nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d][dimensions]
    size = () if dimensions == 0 else (3,)
    more = {} if dimensions == 0 else {"padding": 1}
    net = chain(
        kind, count, lambda k, n: nn.Sequential(make(2, 5, *size, **more), nn.SiLU(), make(5, 2 * n, *size, **more)), 1
    )
    x = image(3, 4, *(4, 3, 2)[:dimensions]).requires_grad_()
    assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [x])
    with torch.no_grad():
        assert_close([net.inverse(net(x))], [x])


class Attention(nn.Module):
    def __init__(self, width, outputs):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, dropout=0.1, batch_first=True)
        self.out = nn.Linear(width, outputs * width)

    def forward(self, x):
        x = self.norm(x)
        return self.out(self.attention(x, x, x, need_weights=False)[0])


def mlp(width, outputs):
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, 2 * width),
        nn.GELU(),
        nn.Dropout(0.1),
        nn.Linear(2 * width, outputs * width),
    )


@kinds
@pytest.mark.parametrize("mode", [True, False])
def test_reversible_transformer(kind, mode):
    """Tokens (batch, length, features): attention and MLP are the two conditioners of each block."""
    torch.manual_seed(0)
    coupling, outputs = KINDS[kind]
    blocks = [
        coupling(Split(Attention(8, outputs), outputs, -1), Split(mlp(8, outputs), outputs, -1)) for _ in range(3)
    ]
    net = revflow.ReversibleSequence(blocks, split_dim=-1)
    model = nn.ModuleList([nn.Embedding(11, 16), net, nn.Linear(16, 11)]).double().train(mode)
    tokens = torch.arange(10).reshape(2, 5)
    embedded = lambda: model[0](tokens)  # noqa: E731
    assert_same_gradients(model, lambda: model[2](net(embedded())), lambda: model[2](net.plain(embedded())), [])


@kinds
def test_streams_of_different_shapes(kind):
    """The image in one stream decides about the vector in the other, and the other way round."""

    class FromImage(nn.Module):
        def __init__(self, n):
            super().__init__()
            self.linear = nn.Linear(3, n * 5)

        def forward(self, x):
            return torch.tanh(self.linear(x.mean((2, 3))))

    class FromVector(nn.Module):
        def __init__(self, n):
            super().__init__()
            self.linear = nn.Linear(5, n * 3)

        def forward(self, v):
            return torch.tanh(self.linear(v))[..., None, None].expand(-1, -1, 4, 4)

    torch.manual_seed(0)
    coupling, n = KINDS[kind]
    blocks = [coupling(Split(FromVector(n), n, 1), Split(FromImage(n), n, 1)) for _ in range(3)]
    net = revflow.ReversibleSequence(blocks).double()
    x, v = image(2, 3, 4, 4).requires_grad_(), image(2, 5).requires_grad_()
    joined = lambda f: lambda: torch.cat([s.flatten() for s in f((x, v))])  # noqa: E731
    assert_same_gradients(net, joined(net), joined(net.plain), [x, v])


class TestPixelUnshuffle:
    def test_halves_are_even_and_odd_rows(self):
        x = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
        (y,) = revflow.PixelUnshuffle(2)(x)
        assert y.shape == (2, 12, 2, 3)
        assert torch.equal(y[:, 0:3], x[:, :, 0::2, 0::2])
        assert torch.equal(y[:, 3:6], x[:, :, 0::2, 1::2])
        assert torch.equal(y[:, 6:9], x[:, :, 1::2, 0::2])
        assert torch.equal(revflow.PixelUnshuffle(2).inverse(y)[0], x)

    def test_same_values_as_torchs_in_another_order(self):
        x = image(1, 2, 6, 9)
        (y,) = revflow.PixelUnshuffle(3)(x)
        theirs = nn.functional.pixel_unshuffle(x, 3).unflatten(1, (2, 3, 3)).permute(0, 2, 3, 1, 4, 5).flatten(1, 3)
        assert torch.equal(y, theirs)

    def test_channels_last_stays_channels_last(self):
        x = image(2, 3, 6, 4).to(memory_format=torch.channels_last)
        (y,) = revflow.PixelUnshuffle(2)(x)
        (back,) = revflow.PixelUnshuffle(2).inverse(y)
        assert y.is_contiguous(memory_format=torch.channels_last) and back.stride() == x.stride()

    def test_channels_in_front_of_a_depth(self):
        x = image(2, 3, 5, 6, 4)
        (y,) = revflow.PixelUnshuffle(2, channel_dim=1)(x)
        assert y.shape == (2, 12, 5, 3, 2)
        for depth in range(5):
            (flat,) = revflow.PixelUnshuffle(2)(x[:, :, depth])
            assert torch.equal(y[:, :, depth], flat)
        assert torch.equal(revflow.PixelUnshuffle(2, channel_dim=1).inverse(y)[0], x)

    def test_channels_last_stays_channels_last_in_front_of_a_depth(self):
        x = image(2, 3, 5, 6, 4).to(memory_format=torch.channels_last_3d)
        (y,) = revflow.PixelUnshuffle(2, channel_dim=1)(x)
        (back,) = revflow.PixelUnshuffle(2, channel_dim=1).inverse(y)
        assert y.is_contiguous(memory_format=torch.channels_last_3d) and back.stride() == x.stride()

    def test_refuses_what_does_not_divide(self):
        with pytest.raises(ValueError, match=r"multiples of 2; got \(1, 3, 5, 4\)"):
            revflow.PixelUnshuffle(2)(torch.zeros(1, 3, 5, 4))
        with pytest.raises(ValueError, match=r"multiple of 4; got \(1, 6, 2, 2\)"):
            revflow.PixelUnshuffle(2).inverse(torch.zeros(1, 6, 2, 2))
        with pytest.raises(ValueError, match="at least 1"):
            revflow.PixelUnshuffle(0)
