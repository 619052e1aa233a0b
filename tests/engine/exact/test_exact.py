"""Exact arithmetic: outputs, rebuilt inputs and gradients equal to ordinary autograd's, to the last bit."""

import pytest
import torch
from torch import nn

import revflow
from engine.exactly import (
    GRID,
    assert_equal,
    assert_exact,
    autocast,
    by_hand,
    cpu_and_cuda,
    directions,
    frames,
    mixed,
    network,
    of_many,
    raw,
    run,
    shut,
    stacks,
    tokens,
    watch,
)
from engine.nets import (
    Conditioner,
    Scale,
    additive,
    additive_two,
    affine,
    affine_two,
    conditioners,
    gated,
    gated_two,
    of_one,
    weighted,
)

pytestmark = pytest.mark.filterwarnings("error", "ignore::DeprecationWarning")  # healthy runs say nothing


# Equality with ordinary autograd


@stacks
@autocast
@directions
@cpu_and_cuda
def test_everything_is_equal(stack, low, inverse, device, monkeypatch):
    """To `plain`, and to the formulas written out, which `plain` could be wrong about."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    net, x = network(stack).to(device), frames().to(device)
    function = net.inverse if inverse else net
    if inverse:
        x = network(stack)(frames()).detach().to(device)

    def oracle(x):
        return by_hand(net, x, inverse)[0]

    if not inverse:
        assert_exact(net, x, low=low)
    assert_exact(net, x, low=low, function=function, plain=oracle)


@autocast
@pytest.mark.parametrize("bits", [8, 12, 18])
def test_other_grids(low, bits):
    grid = revflow.Grid(bits)
    net = network(mixed, exact=grid)
    assert_exact(net, frames(), low=low, plain=lambda x: by_hand(net, x, grid=grid)[0])
    with torch.no_grad():
        assert torch.equal(net(frames()), grid.round(net(frames())))


@stacks
@pytest.mark.parametrize("bits", [16, 40])
def test_streams_of_float64(stack, bits):
    net = network(stack, exact=revflow.Grid(bits)).double()
    assert_exact(net, frames(dtype=torch.float64), plain=lambda x: by_hand(net, x, grid=revflow.Grid(bits))[0])


@autocast
def test_a_thousand_additive_blocks(low):
    net = tokens(1000)
    assert_exact(net, frames(4, 16), low=low)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low):
        y = net(frames(4, 16))
        assert torch.equal(net.inverse(y), GRID.round(frames(4, 16))) and torch.equal(net(net.inverse(y)), y)


@autocast
def test_two_hundred_convolutions(low):
    assert_exact(network(of_many(additive, 200)), frames(1, 8, 4, 4), low=low)


@autocast
def test_a_hundred_gated_blocks_with_saturated_gates(low):
    """Many values do not fit in a byte: these escape, and are restored."""
    net, x = tokens(100, outputs=2, scale=2.0, kind=revflow.GatedCoupling), frames(4, 16)
    shut(net)
    assert_exact(net, x, low=low)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low):
        _, residuals = net.forward_with_residuals(x)
    assert len(residuals) == 100
    escapes = sum(len(r.escaped) for r in residuals)
    assert 100 < escapes < 100 * x.numel() / 2
    assert sum(r.codes.ne(0).logical_and(r.codes.ne(-128)).sum() for r in residuals) > 100


@pytest.mark.parametrize("make", [gated, gated_two, affine_two])
@autocast
def test_escapes_of_convolutions(make, low):
    net = network(of_one(make))
    shut(net, 1.0 if make is affine_two else 20.0)
    assert_exact(net, frames(), low=low)


class UsesItsInputAgain(Conditioner):
    """And its parameters: the order in which their gradients are added up decides the last bit."""

    def forward(self, x):
        inner = super().forward(x)
        out = super().forward(x + 0.1 * (inner if self.outputs == 1 else inner[0]))
        return out + 0.3 * x if self.outputs == 1 else tuple(o + 0.1 * x.sin() for o in out)


@autocast
@directions
@pytest.mark.parametrize("kind", [revflow.AdditiveCoupling, revflow.AffineCoupling, revflow.GatedCoupling])
@pytest.mark.parametrize("two", [False, True])
def test_conditioners_that_use_their_input_several_times(kind, two, inverse, low):
    torch.manual_seed(0)
    outputs = len(kind.coefficients)
    blocks = [kind(*(UsesItsInputAgain(4, outputs) for _ in range(1 + two))) for _ in range(3)]
    net = revflow.ReversibleSequence(blocks, exact=True)
    function = net.inverse if inverse else net
    assert_exact(net, 0.3 * frames(), low=low, function=function, plain=lambda x: by_hand(net, x, inverse)[0])


@autocast
@pytest.mark.parametrize("kind", [revflow.AdditiveCoupling, revflow.GatedCoupling])
def test_three_streams(kind, low):
    torch.manual_seed(0)

    class Joint(Conditioner):
        def forward(self, a, b):
            return super().forward(a * b + a)

    net = revflow.ReversibleSequence([kind(Joint(4, len(kind.coefficients))) for _ in range(5)], exact=True)
    assert_exact(net, *(frames(2, 4, 6, 4, seed=k) for k in range(3)), low=low)


@pytest.mark.parametrize("make", [additive, affine, gated])
def test_one_block_in_several_places(make):
    block = make()
    assert_exact(revflow.ReversibleSequence([block, make(), block, block, block], exact=True), frames())


@pytest.mark.xfail(strict=True, reason="the uses in one block are added up before those in others are added to them")
@pytest.mark.parametrize("case", ["parameters of F and G", "parameters used twice", "context of F and G"])
def test_tensors_used_several_times_in_each_of_several_blocks(case):
    """Known: the last bit of these gradients, and of no others, may differ from ordinary autograd's."""
    torch.manual_seed(0)
    F, c = Conditioner(4), (1 + 0.1 * frames(2, 1, 1, 1)).requires_grad_()
    blocks = {
        "parameters of F and G": [revflow.AdditiveCoupling(F, F)] * 3,
        "parameters used twice": [revflow.AdditiveCoupling(UsesItsInputAgain(4))] * 3,
        "context of F and G": [additive_two() for _ in range(4)],
    }[case]
    net, context = revflow.ReversibleSequence(blocks, exact=True), {"condition": c} if "context" in case else {}
    wanted = [c] if context else list(net.parameters())
    assert_equal(*(torch.autograd.grad(weighted(f(frames(), **context)), wanted) for f in (net, net.plain)))


@autocast
def test_a_bijection_that_stretches(low):
    """Its inverse shrinks rounding errors to less than half a unit: it is exact though it is no coupling."""
    net = network(lambda: [additive(), Scale(), gated(), Scale(), additive_two()])
    assert_exact(net, frames(), low=low)
    assert_equal(*(run(net, f, [frames()], low) for f in (net, lambda x: by_hand(net, x)[0])))


def test_one_tensor_as_both_streams_and_streams_of_two_kinds():
    net, x = network(mixed), frames(2, 4, 6, 4).requires_grad_()
    found, expected = (torch.autograd.grad(sum(map(weighted, f((x, x)))), x) for f in (net, net.plain))
    assert_equal(found, expected)

    class Cast(Conditioner):
        def forward(self, x):
            return super().forward(x.float())

    net = revflow.ReversibleSequence([revflow.GatedCoupling(Cast(4, 2)) for _ in range(4)], exact=True)
    assert_exact(net, frames(2, 4, 6, 4), frames(2, 4, 6, 4, seed=2).double())


@stacks
def test_dropout_and_batch_norm(stack):
    """Seeded alike; the statistics move once, and by the same."""
    net, twin = (network(stack, dropout=0.4) for _ in range(2))
    for model in (net, twin):
        for conditioner in conditioners(model):
            conditioner.norm = nn.BatchNorm2d(6)
    for k in range(2):
        assert_equal(run(net, net, [frames(seed=k)]), run(twin, twin.plain, [frames(seed=k)]))
    assert all(map(torch.equal, net.buffers(), twin.buffers()))


@stacks
@pytest.mark.parametrize("low", [False, True])
def test_context(stack, low):
    """One use in a block."""
    net, c = network(stack), 1 + 0.1 * frames(2, 1, 1, 1)
    assert_exact(net, frames(), low=low, condition=c)


@pytest.mark.parametrize("make", [additive, affine, gated])
def test_the_gradient_of_context(make):
    net, c = network(of_one(make)), (1 + 0.1 * frames(2, 1, 1, 1)).requires_grad_()
    found, expected = (torch.autograd.grad(weighted(f(frames(), condition=c)), c) for f in (net, net.plain))
    assert_equal(found, expected)


@stacks
def test_frozen_parts_and_a_part_of_the_loss(stack):
    net, x = network(stack), frames()
    for p in [*net[0].parameters(), *list(net.parameters())[::3]]:
        p.requires_grad_(False)
    for k in (0, 1):
        assert_equal(*(run(net, lambda x, f=f, k=k: f(x).chunk(2, 1)[k], [x]) for f in (net, net.plain)))


@stacks
@pytest.mark.parametrize(
    "laid_out",
    [
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3),
        lambda x: torch.cat((x, x), 3)[..., ::2],
        lambda x: x[:, :, :, :1].expand(-1, -1, -1, 4),
    ],
    ids=["channels_last", "transposed", "strided", "expanded"],
)
def test_layouts(stack, laid_out):
    assert_exact(network(stack), laid_out(frames(2, 8, 4, 4)))


@pytest.mark.parametrize("first", [nn.GELU, nn.Sigmoid, nn.SiLU, nn.Softplus])
@pytest.mark.parametrize("kind", [revflow.AdditiveCoupling, revflow.GatedCoupling])
def test_activations_first(first, kind):
    """Their last bit depends on the strides that they see."""
    torch.manual_seed(0)

    def conditioner():
        return nn.Sequential(first(), Conditioner(5, len(kind.coefficients)))

    for shape in ((3, 10, 5, 3), (3, 10, 7, 9)):
        for x in (frames(*shape), frames(*shape).to(memory_format=torch.channels_last)):
            net = revflow.ReversibleSequence([kind(conditioner()) for _ in range(3)], exact=True)
            assert_exact(net, x)


class Curved(revflow.Coupling):
    """Of one's own, and only roughly undone."""

    coefficients = ("shift",)

    @staticmethod
    def combine(x, shift):
        return nn.functional.softplus(x) + shift

    @staticmethod
    def separate(y, shift):
        return (y - shift) * torch.sigmoid(y)


@autocast
@pytest.mark.parametrize("guard", ["off", "raise"])
def test_a_coupling_of_ones_own(guard, low):
    """Exact however bad its `separate`: what is missing is a residual. A width of 2 splits in streams with gaps."""
    torch.manual_seed(0)
    blocks = [Curved(Conditioner(5)) for _ in range(3)]
    for split_dim, shape in ((1, (3, 10, 5, 3)), (3, (3, 5, 7, 2))):
        net = revflow.ReversibleSequence(blocks, split_dim, exact=True, guard=guard)
        assert_exact(net, frames(*shape), low=low)


@stacks
def test_empty_batches(stack):
    net = network(stack)
    if stack.__name__ == "mixed":
        net = net[:2]
    y = net(frames(0, 8, 6, 4))
    y.sum().backward()
    assert y.shape == (0, 8, 6, 4)


def test_gradients_are_those_of_stored_activations_after_optimizer_steps():
    """Two networks, trained apart, end up the same."""
    ends = []
    for attribute in ("forward", "plain"):
        net = network(mixed)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        for k in range(5):
            optimizer.zero_grad()
            getattr(net, attribute)(frames(seed=k)).square().mean().backward()
            optimizer.step()
        ends.append([p.detach() for p in net.parameters()])
    assert_equal(*ends)


# Without gradients, and back


@stacks
@autocast
def test_output_without_gradients(stack, low):
    net, x = network(stack), frames()
    y = network(stack)(x).detach()
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        expected = [net(x), net.plain(x), net.inverse(y)]
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                assert_equal([net(x), net.eval().plain(x), net.inverse(y)], expected)
    for y in expected:
        assert_equal([GRID.round(y)], [y])


@stacks
@autocast
def test_inverse(stack, low):
    """By itself it is exact where all couplings add, both ways, and near elsewhere; with residuals it is exact."""
    net, x = network(stack), frames()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low):
        y, on_grid = net(x), GRID.round(x)
        back = net.inverse(y)
        if "additive" in stack.__name__:
            assert_equal([back, net(net.inverse(x))], [on_grid, on_grid])
        else:
            assert not torch.equal(back, on_grid)
            assert low or (back - on_grid).abs().max() < 5e-3
        found, residuals = net.forward_with_residuals(x)
        assert_equal([found, net.inverse_with_residuals(found, residuals)], [y, on_grid])
        assert_equal([net.inverse_with_residuals(found, tuple(residuals))], [on_grid])  # they are not used up
    counts = {"additive": 0, "additive_two": 0, "affine_two": 6, "gated_two": 6, "mixed": 6}
    assert len(residuals) == counts.get(stack.__name__, 3)


def test_residuals_and_gradients():
    """The way there is `plain`; the way back has no graph, since none would lead through a residual."""
    net, x = network(mixed), frames()
    assert_equal(run(net, lambda x: net.forward_with_residuals(x)[0], [x]), run(net, net.plain, [x]))
    y, residuals = net.forward_with_residuals(x)
    assert not net.inverse_with_residuals(y, residuals).requires_grad


def test_residuals_with_hooks_on_blocks_and_streams_as_a_tuple():
    net, x = network(mixed), (frames(2, 4, 6, 4), frames(2, 4, 6, 4, seed=2))
    for block in net:
        block.register_forward_hook(lambda *_: None)
    y, residuals = net.forward_with_residuals(x)
    assert_equal(net.inverse_with_residuals(y, residuals), [GRID.round(s) for s in x])
    assert_exact(net, *x)


def test_residuals_belong_to_exact_sequences():
    net, x = network(of_one(gated), exact=False), frames()
    for call in (net.forward_with_residuals, lambda x: net.inverse_with_residuals(x, [])):
        with pytest.raises(RuntimeError, match=r"residuals exist only in exact arithmetic: .*exact=True"):
            call(x)


@pytest.mark.parametrize("make", [additive, gated])
def test_inputs_off_the_grid_and_negative_zeros(make):
    """What is next to a multiple counts as that multiple: every stream is on the grid, and no zero is negative."""
    net, x = network(of_one(make)), GRID.round(frames())
    x[0] = 0.0
    for near in (x + 0.4 * GRID.unit, x.where(x != 0, -0.0)):
        assert not torch.equal(raw(near), raw(x))
        assert_equal(run(net, net, [near]), run(net, net, [x]))
        assert_equal([net.inverse(near)], [net.inverse(x)])
    given, _ = watch(net)
    y = net(x)
    for s in (y, *(a for args in given for a in args)):
        assert torch.equal(raw(GRID.round(s)), raw(s))
