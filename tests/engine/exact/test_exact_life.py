"""Exact sequences in use: what PyTorch makes of them, what they cost, and how they are put together."""

import copy
import pickle

import pytest
import torch
from torch import nn

import revflow
from engine.exactly import (
    GRID,
    assert_equal,
    assert_exact,
    by_hand,
    directions,
    frames,
    mixed,
    network,
    of_many,
    run,
    shut,
    stacks,
    tokens,
)
from engine.nets import (
    Scale,
    additive,
    additive_two,
    affine,
    affine_two,
    conditioners,
    evaluations,
    gated,
    gated_two,
    image,
    of_one,
    weighted,
)

pytestmark = pytest.mark.filterwarnings("error", "ignore::DeprecationWarning")  # healthy runs say nothing


# What PyTorch makes of a module


@stacks
def test_func_and_forward_mode(stack):
    """Values are `plain`'s; derivatives come from other kernels, and are near."""
    net, x, tangent = network(stack), frames(), frames(seed=2)
    parameters = dict(net.named_parameters())

    def loss(parameters, x):
        return weighted(torch.func.functional_call(net, parameters, (x,)))

    found = torch.func.grad(loss)(parameters, x)
    expected = torch.autograd.grad(weighted(net.plain(x)), parameters.values())
    torch.testing.assert_close(tuple(found.values()), expected, rtol=1e-4, atol=1e-4)
    _, expected = torch.autograd.functional.jvp(net.plain, x, tangent)
    assert expected.abs().min() > 0
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            y, found = torch.func.jvp(net, (x,), (tangent,))
            with torch.autograd.forward_ad.dual_level():
                dual = torch.autograd.forward_ad.unpack_dual(net(torch.autograd.forward_ad.make_dual(x, tangent)))
        assert_equal([y, dual.primal], [net.plain(x)] * 2)
        torch.testing.assert_close([found, dual.tangent], [expected] * 2, rtol=1e-4, atol=1e-4)


@stacks
def test_vmap(stack):
    """Whose kernels are others: on the grid, and within a few units."""
    net, x = network(stack), frames(3, 2, 8, 6, 4)
    found = torch.func.vmap(net)(x)
    assert torch.equal(GRID.round(found), found)
    torch.testing.assert_close(found, torch.stack([net.plain(s) for s in x]), rtol=0, atol=64 * GRID.unit)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_export(mode):
    net, x = network(mixed), frames()
    with mode():
        program = torch.export.export(net, (x,))
        assert_equal([program.module()(x)], [net.plain(x)])


@stacks
def test_log_det(stack):
    net, x = network(stack), frames()

    (y, found), (expected_y, expected) = net.forward_with_log_det(x), by_hand(net, x)
    assert_equal([y], [expected_y])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    plain = lambda x: net._chain(x, {}, log_det=True).run()  # noqa: E731
    with torch.no_grad():
        assert_equal(net.forward_with_log_det(x), plain(x))
    assert_equal(run(net, net.forward_with_log_det, [x]), run(net, plain, [x]))


def test_log_det_is_not_rounded():
    net, x = network(lambda: [Scale()]), frames()
    for function in (net.forward_with_log_det, torch.no_grad()(net.forward_with_log_det)):
        assert_equal([function(x)[1]], [net[0].log_det(x)])
    assert not torch.equal(GRID.round(net[0].log_det(x)), net[0].log_det(x))


@stacks
def test_save_on_cpu_and_two_backward_passes(stack):
    net, x = network(stack), frames().requires_grad_()
    wanted = [x, *net.parameters()]
    expected = torch.autograd.grad(weighted(net.plain(x)), wanted)
    with torch.autograd.graph.save_on_cpu():
        loss = weighted(net(x))
    for _ in range(2):
        assert_equal(torch.autograd.grad(loss, wanted, retain_graph=True), expected)


def test_inside_a_checkpoint_and_as_a_conditioner():
    inner = network(of_one(gated_two))
    x = frames(2, 16, 6, 4)
    net = revflow.ReversibleSequence([revflow.AdditiveCoupling(inner), additive(8), gated(8)], exact=True)
    expected = run(net, net.plain, [x])
    assert_equal(run(net, lambda x: torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False), [x]), expected)
    assert evaluations(net, lambda: run(net, net, [x])) == [[2] * 6, [2], [2]]


# What it costs


@pytest.mark.parametrize("make", [additive, additive_two])
@directions
def test_additive_blocks_keep_no_more_than_in_floating_point(make, inverse):
    x = frames()
    for depth in (2, 8):
        for guard in ("off", "warn"):
            nets = [
                revflow.ReversibleSequence(network(of_many(make, depth)), exact=exact, guard=guard)
                for exact in (True, False)
            ]
            exact, other = (revflow.measure_memory(lambda n=n: n.inverse(x) if inverse else n(x)).kept for n in nets)
            # the guard's few values are kept as float64's bits, with a sum, where float32 would do
            assert exact == other == x.nbytes if guard == "off" else exact - other <= 8 * depth * 2 * 64


@pytest.mark.parametrize(("make", "steps"), [(affine, 1), (affine_two, 2), (gated, 1), (gated_two, 2)])
@directions
def test_other_blocks_keep_a_byte_a_value(make, steps, inverse):
    """And the values that escape, where there are any; no stream."""
    x = 0.1 * frames()
    for depth in (2, 6):
        net = revflow.ReversibleSequence(network(of_many(make, depth)), exact=revflow.Grid(12), guard="off")
        kept = revflow.measure_memory(lambda net=net: net.inverse(x) if inverse else net(x)).kept
        assert kept == x.nbytes + depth * steps * x.numel() // 2


def test_escapes_are_kept():
    net, x = tokens(10, outputs=2, scale=2.0, kind=revflow.GatedCoupling), frames(4, 16)
    net = revflow.ReversibleSequence(net, exact=True, guard="off")
    shut(net)
    _, residuals = net.forward_with_residuals(x)
    bytes_of_residuals = sum(t.nbytes for r in residuals for t in r)
    assert sum(len(r.escaped) for r in residuals) > 0
    assert revflow.measure_memory(lambda: net(x)).kept == x.nbytes + bytes_of_residuals


def test_a_training_step_leaves_nothing():
    net = network(mixed)
    run(net, net, [frames()])
    assert revflow.measure_memory(lambda: run(net, net, [frames()]) and None).kept == 0


def test_predicted_memory():
    """Of fake tensors no value is said to escape; here none does. What looks at values, they leave out."""

    def step(backward):
        torch.manual_seed(0)
        net = revflow.ReversibleSequence(mixed(), exact=revflow.Grid(12), guard="off")
        y = net(0.1 * torch.randn(2, 8, 6, 4))
        return y.square().sum().backward() if backward else y

    for backward in (False, True):
        tracked, predicted = (revflow.measure_memory(lambda b=backward: step(b), predict=p) for p in (False, True))
        assert tracked.kept == predicted.kept
    assert tracked.peak == predicted.peak


@stacks
@directions
def test_two_evaluations(stack, inverse):
    net, x = network(stack), frames()
    if inverse:
        x = net(x).detach()
    counts = evaluations(net, lambda: run(net, net.inverse if inverse else net, [x]))
    assert counts == [[2] * len(conditioners(block)) for block in net]


def test_verify():
    report = revflow.verify(network(mixed), frames())
    assert report.ok and report.gradients.error == 0


# The sequence


def test_exact_survives():
    net, x = network(mixed, exact=revflow.Grid(12)), frames()
    expected, grid = run(net, net, [x]), revflow.Grid(12)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), net[:], net[:3] + net[3:]):
        assert "exact=Grid(bits=12)" in repr(other)
        assert_equal(run(other, other, [x]), expected)
    assert "exact" not in repr(network(mixed, exact=False))
    for other in (net[:2] * 2, net[:1] + nn.Sequential(additive())):
        with torch.no_grad():
            assert torch.equal(grid.round(other(x)), other(x)) and not torch.equal(
                other(x), GRID.round(other(x) + grid.unit / 2)
            )


def test_true_is_a_grid_of_16_bits_and_false_is_none():
    x = frames()
    assert_equal([network(mixed)(x)], [network(mixed, exact=revflow.Grid(16))(x)])
    with torch.no_grad():
        off_grid = network(mixed, exact=False)(x)
    assert not torch.equal(GRID.round(off_grid), off_grid)


def test_one_grid_for_a_sequence_and_those_inside():
    net = revflow.ReversibleSequence([network(of_one(additive)), additive()], exact=True)
    assert_exact(net, frames())
    for inner, outer in ((True, False), (False, True), (revflow.Grid(12), True)):
        blocks = network(of_one(additive), exact=inner), network(of_one(additive), exact=outer)
        with pytest.raises(RuntimeError, match=r"block 0 is a ReversibleSequence with exact=.* inside one with exact="):
            revflow.ReversibleSequence([blocks[0]], exact=outer)(frames())
        with pytest.raises(ValueError, match=r"cannot add sequences with exact=.* and exact="):
            blocks[0] + blocks[1]


@pytest.mark.parametrize("exact", [None, 16, 1, "yes", 0.5])
def test_other_values_of_exact_are_refused(exact):
    with pytest.raises(TypeError, match=r"exact must be True, False or a revflow.Grid; got"):
        revflow.ReversibleSequence([additive()], exact=exact)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_streams_that_have_no_grid_are_refused(dtype):
    with pytest.raises(TypeError, match=f"streams of floating-point numbers, not of {dtype}"):
        network(of_one(additive))((frames(2, 4, 6, 4), torch.ones(2, 4, 6, 4, dtype=dtype)))


def test_residuals_of_another_sequence_are_refused():
    torch.manual_seed(0)
    short, long = (revflow.ReversibleSequence([gated(4) for _ in range(n)], exact=True) for n in (2, 3))
    x = image(dtype=torch.float32)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"block 0 .*there is no residual left for this block"):
            long.inverse_with_residuals(x, short.forward_with_residuals(x)[1])
        with pytest.raises(ValueError, match="3 residuals were given, and 1 not used"):
            short.inverse_with_residuals(x, long.forward_with_residuals(x)[1])
