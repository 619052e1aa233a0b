"""Couplings and blocks of one's own: what they may do, and what is refused by name."""

import pytest
import torch
from torch import nn

import revflow
from engine.nets import Conditioner, additive, assert_same_gradients, image
from revflow._rewind.direction import FORWARD, INVERSE

PARAMETER = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
"""Of nobody's."""


class Shift(revflow.Coupling):
    """An additive coupling, of which subclasses break a rule."""

    coefficients = ("shift",)

    @staticmethod
    def combine(x, shift):
        return x + shift

    @staticmethod
    def separate(y, shift):
        return y - shift


def with_maps(combine=Shift.combine, separate=Shift.separate):
    """A class of couplings of these."""
    return type("Mine", (Shift,), {"combine": staticmethod(combine), "separate": staticmethod(separate)})


def chain(kind, depth=2, **options):
    torch.manual_seed(0)
    return revflow.ReversibleSequence([kind(Conditioner(4)) for _ in range(depth)], **options).double()


# --- a map whose derivative depends on the stream


class Bend(revflow.Coupling):
    """y = sinh(asinh(x) + shift): its derivative, cosh(asinh(x) + shift) / sqrt(1 + x²), depends on x."""

    coefficients = ("shift",)

    @staticmethod
    def combine(x, shift):
        return torch.sinh(torch.asinh(x) + shift)

    @staticmethod
    def separate(y, shift):
        return torch.sinh(torch.asinh(y) - shift)

    @staticmethod
    def log_derivative(x, shift):
        return torch.cosh(torch.asinh(x) + shift).log() - (1 + x.square()).log() / 2


@pytest.mark.parametrize("way", ["forward", "inverse"])
@pytest.mark.parametrize("options", [{}, {"chunks": 2}, {"exact": True}], ids=str)
def test_a_log_determinant_that_depends_on_the_stream(way, options):
    """The engine's, ordinary autograd's and the Jacobian's; and its gradients."""
    net, x = chain(Bend, **options), image(2, 8, 2, 1).requires_grad_()

    def with_log_det(streams):
        return net._run(streams, {}, INVERSE if way == "inverse" else FORWARD, log_det=True)

    def plainly(streams):
        with revflow.ordinary_autograd():
            return with_log_det(streams)

    assert_same_gradients(net, lambda: with_log_det(x)[1], lambda: plainly(x)[1], [x])
    found = with_log_det(x)[1]
    for k in range(2):
        sample = x[k : k + 1].detach()
        jacobian = torch.autograd.functional.jacobian(lambda s: plainly(s)[0].flatten(), sample).flatten(1)
        assert found[k].item() == pytest.approx(torch.linalg.slogdet(jacobian).logabsdet.item(), rel=1e-4, abs=1e-4)
        if not options:
            assert found[k].item() == pytest.approx(torch.linalg.slogdet(jacobian).logabsdet.item(), rel=1e-10)


@pytest.mark.parametrize("kind", [Bend, revflow.AdditiveCoupling])
def test_a_coupling_s_own_log_determinant(kind):
    block, streams = kind(Conditioner(4)).double(), image().chunk(2, 1)
    (_, expected) = revflow.ReversibleSequence([block]).forward_with_log_det(tuple(streams))
    assert torch.equal(block.log_det(*streams), expected)


def test_a_coupling_that_overrides_log_det_is_refused():
    with pytest.raises(
        TypeError, match="Flow defines log_det, which follows from log_derivative: write log_derivative instead"
    ):

        class Flow(Shift):
            def log_det(self, *streams, **context):
                return streams[0].new_zeros(len(streams[0]))


@pytest.mark.parametrize("name", ["combine", "separate", "log_derivative"])
def test_a_map_that_is_no_static_method_is_refused(name):
    with pytest.raises(TypeError, match=rf"Mine\.{name} must be a @staticmethod"):
        type("Mine", (Shift,), {name: lambda self, x, shift: x})


# --- what would get no gradient


@pytest.mark.parametrize("options", [{}, {"exact": True}, {"chunks": 2}, {"guard": "raise"}], ids=str)
@pytest.mark.parametrize("way", ["forward", "inverse"])
def test_a_tensor_from_elsewhere_in_a_map_is_refused(way, options):
    kind = with_maps(lambda x, shift: x + PARAMETER * shift, lambda y, shift: y - PARAMETER * shift)
    net, x = chain(kind, **options), image()
    name = "combine" if way == "forward" else "separate"
    run = net if way == "forward" else net.inverse
    for _ in range(2):  # not the first time alone
        with pytest.raises(
            RuntimeError, match=rf"block \d \(Mine\): {name} uses a tensor of shape \(\).*Let a conditioner return it"
        ):
            run(x).sum().backward()


def test_a_constant_from_elsewhere_is_none_of_the_engine_s_business():
    factor = PARAMETER.detach()
    net, x = (
        chain(with_maps(lambda x, shift: x + factor * shift, lambda y, shift: y - factor * shift)),
        image().requires_grad_(),
    )
    assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [x])


# --- in place


@pytest.mark.parametrize("options", [{}, {"exact": True}, {"chunks": 2}], ids=str)
def test_combine_in_place_is_refused(options):
    net, x = chain(with_maps(combine=lambda x, shift: x.add_(shift)), **options), image()
    with pytest.raises(RuntimeError, match=r"block 0 \(Mine\).*Mine\.combine changed its arguments in place"):
        net(x)


@pytest.mark.parametrize("options", [{}, {"exact": True}, {"chunks": 2}], ids=str)
def test_separate_in_place_is_refused(options):
    net, x = chain(with_maps(separate=lambda y, shift: y.sub_(shift)), **options), image()
    with pytest.raises(RuntimeError, match=r"Mine\.separate changed its arguments in place"):
        net(x).sum().backward()


class InPlace(revflow.Bijection):
    def __init__(self, way):
        super().__init__()
        self.way = way

    def forward(self, *streams, **context):
        return (streams[0].mul_(2) if self.way == "forward" else streams[0] * 2, *streams[1:])

    def inverse(self, *streams, **context):
        return (streams[0].div_(2) if self.way == "inverse" else streams[0] / 2, *streams[1:])


@pytest.mark.parametrize("way", ["forward", "inverse"])
def test_a_block_that_works_in_place_is_refused(way):
    net, x = revflow.ReversibleSequence([InPlace(way), additive()]).double(), image().requires_grad_()
    with pytest.raises(RuntimeError, match=rf"block 0 \(InPlace\).*{way} changed its input in place"):
        net(x).sum().backward()


# --- results that do not fit


@pytest.mark.parametrize(
    ("combine", "returned"),
    [
        (lambda x, shift: (x + shift)[:, :1], r"a tensor of shape \(2, 1, 6, 4\), torch.float64"),
        (lambda x, shift: (x + shift).float(), r"a tensor of shape \(2, 4, 6, 4\), torch.float32"),
        (lambda x, shift: None, "a NoneType"),
    ],
)
@pytest.mark.parametrize("plain", [False, True])
def test_a_result_that_does_not_fit_is_refused(combine, returned, plain):
    net, x = chain(with_maps(combine=combine)), image(2, 8, 6, 4)
    expected = r"block 0 \(Mine\).*combine must return a tensor of the shape and dtype.*\(2, 4, 6, 4\), torch.float64"
    with pytest.raises(ValueError, match=f"{expected}; it returned {returned}"):
        (net.plain if plain else net)(x)


@pytest.mark.parametrize(
    ("log_derivative", "returned"),
    [
        (lambda x, shift: x[:, :1], r"a tensor of shape \(2, 1, 6, 4\)"),
        (lambda x, shift: x.sum((1, 2, 3)), r"a tensor of shape \(2,\)"),
        (lambda x, shift: 0.0, "a float"),
    ],
)
@pytest.mark.parametrize("gradients", [True, False])
def test_a_log_derivative_that_does_not_fit_is_refused(log_derivative, returned, gradients):
    kind = type("Mine", (Shift,), {"log_derivative": staticmethod(log_derivative)})
    expected = rf"block 0 \(Mine\).*log_derivative must return a tensor .*\(2, 4, 6, 4\); it returned {returned}"
    with torch.set_grad_enabled(gradients), pytest.raises(ValueError, match=expected):
        chain(kind).forward_with_log_det(image(2, 8, 6, 4))


def test_a_map_that_autograd_does_not_know_is_refused():
    """Under ordinary autograd the inverse would have no graph; a gradient of None would say nothing."""
    net = chain(with_maps(separate=lambda y, shift: (y - shift).detach()))
    with pytest.raises(RuntimeError, match=r"Mine\.separate returned a tensor that does not depend on x for autograd"):
        net.inverse(image().requires_grad_()).sum().backward()
    net(image().requires_grad_()).sum().backward()


# --- state that forward writes and inverse reads


class Counting(revflow.Bijection):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, *streams, **context):
        self.calls += 1
        return tuple(s * 2**self.calls for s in streams)

    def inverse(self, *streams, **context):
        return tuple(s / 2**self.calls for s in streams)


class Remembered(revflow.Bijection):
    """Rolls the channels, each time by another number."""

    def __init__(self):
        super().__init__()
        self.by = 0

    def forward(self, *streams, **context):
        self.by = self.by % 3 + 1
        return tuple(s.roll(self.by, 1) for s in streams)

    def inverse(self, *streams, **context):
        return tuple(s.roll(-self.by, 1) for s in streams)


@pytest.mark.parametrize("options", [{}, {"exact": True}], ids=str)
@pytest.mark.parametrize("kind", [Counting, Remembered])
def test_state_that_leads_both_ways_astray_alike_is_seen(kind, options):
    """What is rebuilt is right, and what is differentiated is another function."""
    net = revflow.ReversibleSequence([additive(), kind(), additive()], **options).double()
    with pytest.raises(revflow.ReconstructionError, match=rf"block 1 \({kind.__name__}\).*gave another result"):
        net(image().requires_grad_()).square().sum().backward()


# --- lazy modules


def test_a_lazy_conditioner_is_refused_until_it_has_seen_an_input():
    lazy = nn.Sequential(nn.LazyConv2d(3, 1), nn.Tanh(), nn.LazyConv2d(4, 1))
    net, x = revflow.ReversibleSequence([revflow.AdditiveCoupling(lazy)]), image(dtype=torch.float32).requires_grad_()
    with pytest.raises(RuntimeError, match=r"block 0 \(AdditiveCoupling\).*a LazyConv2d is not initialized"):
        net(x)
    with torch.no_grad():
        net(x)
    assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [x], 1e-5)
