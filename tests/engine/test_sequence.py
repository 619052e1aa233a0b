"""ReversibleSequence as a module: inverse, containers, layouts, refusals."""

import copy
import pickle

import pytest
import torch
from torch import nn

import revflow
from engine.nets import STACKS, Conditioner, additive, assert_same_gradients, image, mixed, network, relative_error

stacks = pytest.mark.parametrize("stack", STACKS, ids=lambda s: s.__name__)


@stacks
def test_inverse_undoes_forward(stack):
    net, x = network(stack), image()
    with torch.no_grad():
        assert relative_error(net.inverse(net(x)), x) < 1e-10
        y = image(*net(x).shape, seed=4)
        assert relative_error(net(net.inverse(y)), y) < 1e-10


@stacks
def test_inverse_is_differentiable(stack):
    net = network(stack)
    y = net(image()).detach().requires_grad_()

    def plain_inverse():
        streams = y.chunk(2, 1)
        for block in reversed(list(net)):
            streams = block.inverse(*streams)
        return torch.cat(streams, 1)

    assert_same_gradients(net, lambda: net.inverse(y), plain_inverse, [y])


def test_inverse_of_an_output_in_the_same_graph():
    """An autoencoder with shared weights: the gradient of D(2 E(x)) in x and in every parameter."""
    net, x = network(mixed), image().requires_grad_()

    def plain():
        streams = (2 * net.plain(x)).chunk(2, 1)
        for block in reversed(list(net)):
            streams = block.inverse(*streams)
        return torch.cat(streams, 1)

    assert_same_gradients(net, lambda: net.inverse(2 * net(x)), plain, [x])


def test_is_a_sequential():
    net = network(mixed)
    assert list(net.state_dict()) == list(nn.Sequential(*net).state_dict())
    assert len(net) == 8 and net[2] is list(net)[2] and net[-1] is list(net)[-1]
    assert isinstance(net[2:4], revflow.ReversibleSequence) and list(net[2:4]) == list(net)[2:4]
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(image()), net(image()))


@pytest.mark.parametrize("split_dim", [1, -3, 2, 3])
def test_split_dimension(split_dim):
    torch.manual_seed(0)
    channels = 4 if split_dim in (1, -3) else 8
    net = revflow.ReversibleSequence([additive(channels) for _ in range(2)], split_dim=split_dim).double()
    x = image().requires_grad_()
    assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [x])


def test_channels_last_stays_channels_last():
    net = network(STACKS[0]).to(memory_format=torch.channels_last)
    seen = []
    for block in net:
        block.F.register_forward_hook(lambda module, args, out: seen.append(args[0].stride()))
    x = image().to(memory_format=torch.channels_last).requires_grad_()
    y = net(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.square().sum().backward()
    assert len(set(seen)) == 1 and seen[0][1] == 1
    assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [x])


@pytest.mark.parametrize(
    "change", [lambda x: x.transpose(2, 3), lambda x: x[:, :, ::2], lambda x: x[:1].expand(3, -1, -1, -1)]
)
def test_inputs_of_other_layouts(change):
    net, x = network(STACKS[0]), image().requires_grad_()
    assert_same_gradients(net, lambda: net(change(x)), lambda: net.plain(change(x)), [x])


def test_expanded_and_non_contiguous_gradients():
    net, x = network(mixed), image().requires_grad_()
    for gradient in (torch.ones(()).double().expand(2, 32, 3, 2), image(2, 32, 2, 3).transpose(2, 3)):
        found = torch.autograd.grad(net(x), x, gradient)[0]
        assert relative_error(found, torch.autograd.grad(net.plain(x), x, gradient)[0]) < 1e-10


def test_float32_reconstruction_and_gradient_error_of_36_blocks():
    """The promise: at most 3 times plain autograd's own error; reconstruction within 1e-5."""
    torch.manual_seed(0)
    net, x = revflow.ReversibleSequence([additive(4) for _ in range(36)]), image(dtype=torch.float32)
    with torch.no_grad():
        assert relative_error(net.inverse(net(x)), x) < 1e-5
    found = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    plain = torch.autograd.grad(net.plain(x).square().sum(), list(net.parameters()))
    net.double()
    exact = torch.autograd.grad(net.plain(x.double()).square().sum(), list(net.parameters()))
    flat = lambda grads: torch.cat([g.double().flatten() for g in grads])  # noqa: E731
    assert relative_error(flat(found), flat(exact)) <= 3 * relative_error(flat(plain), flat(exact))


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

    def test_refuses_what_does_not_divide(self):
        with pytest.raises(ValueError, match=r"multiples of 2; got \(1, 3, 5, 4\)"):
            revflow.PixelUnshuffle(2)(torch.zeros(1, 3, 5, 4))
        with pytest.raises(ValueError, match=r"multiple of 4; got \(1, 6, 2, 2\)"):
            revflow.PixelUnshuffle(2).inverse(torch.zeros(1, 6, 2, 2))
        with pytest.raises(ValueError, match="at least 1"):
            revflow.PixelUnshuffle(0)


class TestRefusals:
    def refuses(self, error, match, blocks, x, **context):
        with pytest.raises(error, match=match):
            revflow.ReversibleSequence(blocks)(x, **context)

    def test_odd_number_of_channels(self):
        self.refuses(
            ValueError, r"dimension 1 in halves; it has 5 .* \(1, 5, 4, 4\)", [additive(4)], torch.zeros(1, 5, 4, 4)
        )

    def test_no_such_dimension(self):
        self.refuses(ValueError, r"dimension 1; the input has shape \(8,\)", [additive(4)], torch.zeros(8))

    def test_conditioner_of_other_channels(self):
        blocks = [additive(4), additive(3)]
        self.refuses(
            RuntimeError, r"block 1 \(AdditiveCoupling\), given .*\(1, 4, 6, 6\)", blocks, torch.zeros(1, 8, 6, 6)
        )

    def test_conditioner_that_changes_the_shape(self):
        blocks = [additive(4), revflow.AdditiveCoupling(nn.Conv2d(4, 4, 3))]
        message = r"block 1 \(AdditiveCoupling\).*shift of the shape .*\(1, 4, 6, 6\).*it returned \(1, 4, 4, 4\)"
        self.refuses(ValueError, message, blocks, torch.zeros(1, 8, 6, 6))

    def test_conditioner_that_returns_too_little(self):
        blocks = [revflow.AffineCoupling(Conditioner(4))]
        self.refuses(ValueError, r"block 0 .*has to return \(log_scale, shift\)", blocks, torch.zeros(1, 8, 6, 6))

    def test_unshuffle_of_odd_height(self):
        blocks = [additive(4), revflow.PixelUnshuffle(2)]
        self.refuses(ValueError, r"block 1 \(PixelUnshuffle\).*\(1, 4, 5, 6\)", blocks, torch.zeros(1, 8, 5, 6))

    def test_context_that_a_conditioner_does_not_take(self):
        blocks = [additive(4), revflow.AdditiveCoupling(nn.Conv2d(4, 4, 1))]
        self.refuses(TypeError, r"block 1 .*condition", blocks, torch.zeros(1, 8, 4, 4), condition=torch.ones(1))

    def test_three_streams_for_two_conditioners(self):
        blocks = [revflow.AdditiveCoupling(nn.Identity(), nn.Identity())]
        self.refuses(ValueError, "takes two streams; got 3", blocks, (torch.zeros(1),) * 3)

    def test_block_that_returns_no_tuple(self):
        block = nn.Identity()
        block.inverse = block.forward
        self.refuses(TypeError, r"block 0 \(Identity\).*tuple of tensors", [block], (torch.zeros(2),))

    def test_what_is_no_block(self):
        with pytest.raises(TypeError, match=r"block 1 .*got a Conv2d.*AdditiveCoupling\(F\)"):
            revflow.ReversibleSequence([additive(4), nn.Conv2d(4, 4, 1)])
        with pytest.raises(TypeError, match=r"AdditiveCoupling: F has to be a torch.nn.Module.* got a function"):
            revflow.AdditiveCoupling(lambda x: x)

    def test_input_that_is_no_tensor(self):
        with pytest.raises(TypeError, match="takes a tensor or a tuple of streams; got a list"):
            revflow.ReversibleSequence([additive(4)])([1, 2])


def test_coupling_of_three_streams():
    torch.manual_seed(0)

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x2, x3):
            return torch.tanh(self.conv(x2 * x3))

    net = revflow.ReversibleSequence([revflow.AdditiveCoupling(Sum()) for _ in range(4)]).double()
    streams = tuple(image(2, 4, 6, 4, seed=k).requires_grad_() for k in range(3))
    joined = lambda function: lambda: torch.cat([s.flatten() for s in function(streams)])  # noqa: E731
    assert_same_gradients(net, joined(net), joined(net.plain), list(streams))


def test_streams_keep_their_dtype():
    net = revflow.ReversibleSequence([additive(4) for _ in range(2)])
    for block in net:
        block.F.register_forward_pre_hook(lambda module, args: (args[0].float(),))
    y = net(image().bfloat16())
    assert y.dtype == torch.bfloat16
    y.sum().backward()


class TestGate:
    def test_in_float32_whatever_the_logit(self):
        logit = torch.tensor([6.25], dtype=torch.bfloat16)
        x, h = torch.tensor([1000.0]), torch.tensor([0.0])
        expected = 1000 * torch.sigmoid(-logit.double())
        assert torch.allclose(revflow.GatedCoupling.combine(x, logit, h).double(), expected, rtol=1e-6)

    def test_inverse_of_a_shut_gate_is_finite(self):
        """1 - sigmoid(30) is zero in float32, sigmoid(-30) is not."""
        x, logit, h = torch.tensor([3.0]), torch.tensor([30.0]), torch.tensor([0.0])
        y = revflow.GatedCoupling.combine(x, logit, h)
        assert torch.allclose(revflow.GatedCoupling.separate(y, logit, h), x, rtol=1e-5)
