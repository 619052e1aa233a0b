"""ReversibleSequence as a container: what nn.Sequential does, and what it refuses."""

import copy
import io
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import nn

import revflow
from engine.nets import (
    Conditioner,
    Scale,
    additive,
    affine_two,
    assert_close,
    assert_same_gradients,
    image,
    network,
    stacks,
    weighted,
)


def gradients(net, x):
    return [net(x), *torch.autograd.grad(weighted(net(x)), list(net.parameters()))]


@stacks
def test_keys_and_items_are_those_of_a_sequential(stack):
    net = network(stack)
    sequential = nn.Sequential(*net)
    assert list(net.state_dict()) == list(sequential.state_dict())
    assert [name for name, _ in net.named_modules()][1:] == [name for name, _ in sequential.named_modules()][1:]
    assert len(net) == len(sequential) and list(net) == list(sequential)
    for k in range(-len(net), len(net)):
        assert net[k] is sequential[k]
    with pytest.raises(IndexError):
        net[len(net)]


@stacks
@pytest.mark.parametrize("part", [slice(1), slice(1, None), slice(None, None, 2), slice(-2, None), slice(0)], ids=str)
def test_slices(stack, part):
    """They share the blocks and keep names and options; checkpoints of nn.Sequential's slices fit."""
    net = revflow.ReversibleSequence(network(stack), -3, guard="raise")
    found, expected = net[part], nn.Sequential(*net)[part]
    assert type(found) is revflow.ReversibleSequence and list(found) == list(expected)
    assert list(found.state_dict()) == list(expected.state_dict())
    assert (found.split_dim, found.extra_repr()) == (net.split_dim, net.extra_repr())


@stacks
def test_checkpoints_move_over_from_a_sequential(stack):
    """Both ways, and from file."""
    source, net = nn.Sequential(*network(stack)), revflow.ReversibleSequence(stack()).double()
    x = image()
    expected = gradients(revflow.ReversibleSequence(source), x)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    assert str(net.load_state_dict(torch.load(file))) == "<All keys matched successfully>"
    assert_close(gradients(net, x), expected)
    back = nn.Sequential(*(copy.deepcopy(block) for block in stack())).double()
    back.load_state_dict(net.state_dict())
    assert_close(gradients(revflow.ReversibleSequence(back), x), expected)


@stacks
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(stack, how, trained):
    """Of a sequence that has a graph alive, too; they share nothing with it."""
    net, x = revflow.ReversibleSequence(network(stack), split_dim=-3, guard="raise"), image()
    y = net(x) if trained else None
    file = io.BytesIO()
    if how == "torch.save":
        torch.save(net, file)
        file.seek(0)
    twin = {
        "deepcopy": lambda: copy.deepcopy(net),
        "pickle": lambda: pickle.loads(pickle.dumps(net)),
        "torch.save": lambda: torch.load(file, weights_only=False),
    }[how]()
    assert repr(twin) == repr(net)
    assert_close(gradients(twin, x), gradients(net, x))
    before = [p.clone() for p in net.parameters()]
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(1)
    assert all(map(torch.equal, before, net.parameters()))
    if trained:
        assert_close(torch.autograd.grad(weighted(y), list(net.parameters())), gradients(net, x)[1:])


EVERY_WAY_IN = pytest.mark.parametrize(
    "put",
    [
        lambda net, block: net.append(block),
        lambda net, block: net.extend([block]),
        lambda net, block: net.insert(0, block),
        lambda net, block: net.add_module("head", block),
        lambda net, block: net.register_module("head", block),
        lambda net, block: net.__setitem__(0, block),
        lambda net, block: net.__iadd__(nn.Sequential(block)),
        lambda net, block: net + nn.Sequential(block),
        lambda net, block: revflow.ReversibleSequence([*net, block]),
        lambda net, block: revflow.ReversibleSequence({"0": block}),
    ],
)
"""Calls that put a block into a sequence."""


class TestBuilding:
    """All of nn.Sequential's ways to put blocks in or take them out: the result is a sequence that trains, or an error."""

    def check(self, net, blocks):
        assert type(net) is revflow.ReversibleSequence and list(net) == blocks
        assert list(net.state_dict()) == list(nn.Sequential(*blocks).state_dict())
        x = image(dtype=torch.float32).requires_grad_()
        assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [x], tolerance=1e-4)

    def blocks(self, count):
        torch.manual_seed(0)
        return [affine_two() for _ in range(count)]

    def test_append_extend_insert(self):
        a, b, c, d, e = self.blocks(5)
        net = revflow.ReversibleSequence([a]).append(b).extend([c, d]).insert(0, e)
        self.check(net, [e, a, b, c, d])
        self.check(revflow.ReversibleSequence([a, b]).insert(-1, c).insert(3, d), [a, c, b, d])
        net = revflow.ReversibleSequence([a])
        net.add_module("1", b)
        net.register_module("2", c)
        self.check(net, [a, b, c])

    def test_set_delete_pop(self):
        a, b, c, d = self.blocks(4)
        net = revflow.ReversibleSequence([a, b, c])
        net[1] = d
        net[-1] = b
        self.check(net, [a, d, b])
        del net[0]
        self.check(net, [d, b])
        assert net.pop(1) is b
        self.check(net, [d])
        net = revflow.ReversibleSequence([a, b, c, d])
        del net[1:3]
        self.check(net, [a, d])

    def test_sums_and_products(self):
        a, b, c, d = self.blocks(4)
        first, second = revflow.ReversibleSequence([a, b], -3, guard="raise"), revflow.ReversibleSequence([c], -3)
        self.check(first + second, [a, b, c])
        self.check(first + nn.Sequential(d), [a, b, d])
        self.check(first * 2, [a, b, a, b])
        self.check(2 * first, [a, b, a, b])
        assert all((net.split_dim, net._guard.mode) == (-3, "raise") for net in (first + second, first * 2, 2 * first))
        self.check(first, [a, b])
        first += second
        second *= 2
        self.check(first, [a, b, c])
        self.check(second, [c, c])

    def test_names(self):
        a, b = self.blocks(2)
        net = revflow.ReversibleSequence(OrderedDict(down=a, up=b))
        assert net.down is a and net[1] is b and all(k.startswith("up.") for k in net[1:].state_dict())
        with pytest.raises(RuntimeError, match=r"block up \(AffineCoupling\)"):
            revflow.ReversibleSequence({"down": a, "up": affine_two(3)})(torch.zeros(1, 8, 4, 4))

    @EVERY_WAY_IN
    def test_what_is_no_block_is_refused(self, put):
        """And the sequence stays as it was."""
        blocks = self.blocks(2)
        net = revflow.ReversibleSequence(blocks)
        with pytest.raises(
            TypeError, match=r"block \w+ must be a module with forward and inverse; got a Conv2d.*AdditiveC"
        ):
            put(net, nn.Conv2d(4, 4, 1))
        self.check(net, blocks)

    @EVERY_WAY_IN
    def test_a_coupling_with_a_parameter_of_its_own_is_refused(self, put):
        """Which the engine would leave without a gradient, as one of a module beside its conditioners."""
        blocks = self.blocks(2)
        net = revflow.ReversibleSequence(blocks)
        for attribute, value, named in (
            ("gain", nn.Parameter(torch.ones(())), "gain"),
            ("scale", nn.Linear(2, 2), "scale.weight"),
        ):
            block = revflow.AdditiveCoupling(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
            setattr(block, attribute, value)
            with pytest.raises(
                TypeError,
                match=rf"block \w+ \(AdditiveCoupling\) has its own parameter {named}\..*let the conditioner",
            ):
                put(net, block)
        self.check(net, blocks)

    def test_blocks_in_no_list_are_refused(self):
        with pytest.raises(TypeError, match=r"got a single AffineCoupling: write ReversibleSequence\(\[block\]\)"):
            revflow.ReversibleSequence(*self.blocks(2)[::-1])

    def test_sums_that_make_no_sense(self):
        net = revflow.ReversibleSequence(self.blocks(1))
        with pytest.raises(ValueError, match="split_dim=1 and split_dim=2"):
            net + revflow.ReversibleSequence(self.blocks(1), 2)
        with pytest.raises(ValueError, match="Sequential class"):
            net + self.blocks(1)
        with pytest.raises(TypeError, match="unsupported"):
            net * 1.5
        with pytest.raises(ValueError, match="Non-positive"):
            net * 0


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
        message = r"block 1 \(AdditiveCoupling\).*shift with the shape .*\(1, 4, 6, 6\).*it returned \(1, 4, 4, 4\)"
        self.refuses(ValueError, message, blocks, torch.zeros(1, 8, 6, 6))

    def test_conditioner_that_returns_too_little(self):
        blocks = [revflow.AffineCoupling(Conditioner(4))]
        self.refuses(ValueError, r"block 0 .*must return \(log_scale, shift\)", blocks, torch.zeros(1, 8, 6, 6))

    def test_unshuffle_of_odd_height(self):
        blocks = [additive(4), revflow.PixelUnshuffle(2)]
        self.refuses(ValueError, r"block 1 \(PixelUnshuffle\).*\(1, 4, 5, 6\)", blocks, torch.zeros(1, 8, 5, 6))

    def test_context_that_a_conditioner_does_not_take(self):
        blocks = [additive(4), revflow.AdditiveCoupling(nn.Conv2d(4, 4, 1))]
        self.refuses(TypeError, r"block 1 .*condition", blocks, torch.zeros(1, 8, 4, 4), condition=torch.ones(1))

    def test_three_streams_for_two_conditioners(self):
        blocks = [revflow.AdditiveCoupling(nn.Identity(), nn.Identity())]
        self.refuses(ValueError, "requires two streams; got 3", blocks, (torch.zeros(1),) * 3)

    def test_block_that_returns_no_tuple(self):
        block = nn.Identity()
        block.inverse = block.forward
        self.refuses(TypeError, r"block 0 \(Identity\).*tuple of tensors", [block], (torch.zeros(2),))

    def test_inverse_that_returns_other_streams(self):
        class Lossy(Scale):
            def inverse(self, *streams, **context):
                return super().inverse(*streams)[:1]

        message = (
            r"block 1 \(Lossy\): inverse returned streams of shapes \(1, 4, 6, 6\), to invert .*\(1, 4, 6, 6\), \(1, 4"
        )
        loss = revflow.ReversibleSequence([additive(4), Lossy()])(torch.zeros(1, 8, 6, 6)).sum()
        with pytest.raises(RuntimeError, match=message):
            loss.backward()

    def test_what_is_no_block(self):
        with pytest.raises(TypeError, match=r"block 1 .*got a Conv2d.*AdditiveCoupling\(F\)"):
            revflow.ReversibleSequence([additive(4), nn.Conv2d(4, 4, 1)])
        with pytest.raises(TypeError, match=r"AdditiveCoupling: F must be a torch.nn.Module.* got a function"):
            revflow.AdditiveCoupling(lambda x: x)

    def test_input_that_is_no_tensor(self):
        with pytest.raises(TypeError, match="takes a tensor or a tuple of streams; got a list"):
            revflow.ReversibleSequence([additive(4)])([1, 2])


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


@pytest.mark.parametrize("given", [{}, {"coefficients": "shift"}])
def test_a_coupling_without_names_of_its_coefficients_is_refused(given):
    methods = {name: staticmethod(lambda x, shift: x + shift) for name in ("combine", "separate")}
    nameless = type("Nameless", (revflow.Coupling,), {**methods, **given})
    with pytest.raises(TypeError, match="Nameless must have an attribute `coefficients`: a tuple of names"):
        nameless(nn.Identity())
