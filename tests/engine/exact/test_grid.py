"""Arithmetic on a grid, as pure functions of tensors: against Python's fractions, to the last bit, for every carrier."""

import math
import re
from fractions import Fraction

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import revflow
from engine.nets import image
from revflow.exact import Extent, fingerprint

CARRIERS = [
    (torch.float32, 16),
    (torch.float32, 1),
    (torch.float32, 30),
    (torch.float64, 30),
    (torch.float64, 52),
    (torch.float16, 6),
    (torch.bfloat16, 3),
]
SIGNIFICANDS = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}

carriers = pytest.mark.parametrize(("dtype", "bits"), CARRIERS, ids=lambda c: str(c).removeprefix("torch."))
modes = pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
deterministic = settings(
    derandomize=True,
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)


def raw(x):
    """The bits, so that 0 is not -0, and a NaN is itself."""
    return x.detach().contiguous().view(INTEGERS[x.element_size()])


def same(a, b):
    return a.dtype == b.dtype and torch.equal(raw(a), raw(b))


def multiples(numbers, dtype, bits):
    """Those multiples of 2^-bits; each fits in the dtype."""
    x = torch.tensor([math.ldexp(n, -bits) for n in numbers], dtype=torch.float64)
    assert torch.equal(x.to(dtype).double(), x)
    return x.to(dtype)


def lists(dtype, most=None):
    """Whole numbers that the dtype holds: all below `most`, and often near that and near zero."""
    most = 2 ** SIGNIFICANDS[dtype] if most is None else most
    one = st.integers(-most, most) | st.integers(-4, 4) | st.sampled_from([-most, 1 - most, most - 1, most])
    return st.lists(one, min_size=1, max_size=8)


def floats(dtype):
    """Of every size, as the dtype rounds them."""
    values = st.lists(st.floats(-1e3, 1e3) | st.floats(-1e-3, 1e-3), min_size=1, max_size=8)
    return values.map(lambda v: torch.tensor(v, dtype=torch.float64).to(dtype))


def expected_round(x, bits):
    """Python rounds a fraction to the even one of two neighbors; its whole numbers know no -0."""
    return multiples([round(Fraction(v) * 2**bits) for v in x.double().tolist()], x.dtype, bits)


@carriers
@modes
@deterministic
@given(data=st.data())
def test_round(dtype, bits, mode, data):
    quarters = lists(dtype).map(lambda n: multiples(n, dtype, bits + 2))  # halves among them
    limit = math.ldexp(1, SIGNIFICANDS[dtype] - bits)
    x = data.draw(quarters | floats(dtype).map(lambda v: v.clamp(-limit, limit)))
    with mode():
        assert same(revflow.Grid(bits).round(x), expected_round(x, bits))


@carriers
@modes
def test_round_of_halves_and_zeros(dtype, bits, mode):
    """A half goes to the even side, and no zero is negative, however it came about."""
    x = multiples([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.25, -0.25, 0.0, -0.0], dtype, bits)
    with mode():
        found = revflow.Grid(bits).round(x)
        assert same(found, multiples([0, 2, 2, 0, -2, -2, 0, 0, 0, 0], dtype, bits))
        assert not found.signbit()[found == 0].any()


@modes
def test_round_leaves_what_is_no_number_or_beyond_the_range(mode):
    x = torch.tensor([1e30, -(2.0**40), torch.inf, -torch.inf, torch.nan])
    with mode():
        found = revflow.Grid().round(x)
    assert same(found[:2], x[:2]) and not found[2:].isfinite().any()


@carriers
@modes
@deterministic
@given(data=st.data())
def test_take_back_undoes_add(dtype, bits, mode, data):
    """To the bit, for any shift whose sum is in range; the sum is the true one."""
    grid, most = revflow.Grid(bits), 2 ** SIGNIFICANDS[dtype]
    n = data.draw(lists(dtype))
    shifts = st.lists(st.integers(-most, most) | st.integers(-9, 9), min_size=len(n), max_size=len(n))
    d = multiples(data.draw(shifts), dtype, bits + 2)
    sums = [a + b for a, b in zip(n, (round(Fraction(v) * 2**bits) for v in d.double().tolist()), strict=True)]
    d[[abs(s) > most for s in sums]] = 0
    sums = [s if abs(s) <= most else a for s, a in zip(sums, n, strict=True)]
    x = multiples(n, dtype, bits)
    with mode():
        y = grid.add(x, d)
        assert same(y, multiples(sums, dtype, bits))
        assert same(grid.take_back(y, d), x)


@carriers
def test_exact_up_to_the_limit_and_no_further(dtype, bits):
    grid, most = revflow.Grid(bits), 2 ** SIGNIFICANDS[dtype]
    assert grid.limit(dtype) == math.ldexp(most, -bits)
    for sign in (1, -1):
        x, d = multiples([sign * (most - 1)], dtype, bits), multiples([sign], dtype, bits)
        y = grid.add(x, d)
        assert y.abs().item() == grid.limit(dtype) and same(grid.take_back(y, d), x)
        beyond = grid.add(y, d)
        assert beyond.abs().item() == grid.limit(dtype)  # rounded: nobody can tell it from y
        assert not same(grid.take_back(beyond, d), y)


@pytest.mark.parametrize("function", ["round", "add", "take_back"])
def test_the_gradient_of_rounding_is_one(function):
    """The gradient that comes is the one that goes, bit for bit, also at zero, at halves and beyond the range."""
    grid = revflow.Grid()
    d = torch.cat((image(1000, dtype=torch.float32), multiples([0, -0.0, 0.5, 1.5], torch.float32, 16), 1e9 * image(9)))
    d, x = d.float().requires_grad_(), grid.round(image(len(d), seed=2, dtype=torch.float32)).requires_grad_()
    gradient = image(len(d), seed=3, dtype=torch.float32)
    if function == "round":
        assert same(torch.autograd.grad(grid.round(d), d, gradient)[0], gradient)
    else:
        of_x, of_d = torch.autograd.grad(getattr(grid, function)(x, d), (x, d), gradient)
        assert same(of_x, gradient) and same(of_d, gradient if function == "add" else -gradient)


@modes
def test_the_tangent_of_rounding_is_one(mode):
    x, tangent = image(50, dtype=torch.float32), image(50, seed=2, dtype=torch.float32)
    grid, dual = revflow.Grid(), torch.autograd.forward_ad
    with mode(), dual.dual_level():
        d = dual.make_dual(x, tangent)
        assert same(dual.unpack_dual(grid.round(d)).tangent, tangent)
        assert same(dual.unpack_dual(grid.add(grid.round(x), d)).tangent, tangent)
        assert same(dual.unpack_dual(grid.take_back(grid.round(x), d)).tangent, -tangent)


# Residuals


def residual_and_back(x, estimate, bits):
    grid = revflow.Grid(bits)
    residual = grid.residual(x, estimate)
    assert residual.codes.dtype == torch.int8 and residual.codes.shape == x.shape and residual.escaped.dtype == x.dtype
    assert (residual.codes == -128).sum() == len(residual.escaped)
    restored = grid.restore(estimate, residual)
    assert same(restored, x)
    return residual


WILD = [torch.nan, torch.inf, -torch.inf, 3.4e38, -3.4e38, 1e-45, -0.0, 0.0, 1 / 3]


@carriers
@deterministic
@given(data=st.data())
def test_restore_undoes_residual_for_any_estimate(dtype, bits, data):
    n = data.draw(lists(dtype))
    x = multiples(n, dtype, bits)
    off = data.draw(st.lists(st.integers(-300, 300), min_size=len(n), max_size=len(n)))
    wild = data.draw(st.lists(st.sampled_from(WILD) | st.none(), min_size=len(n), max_size=len(n)))
    near = [math.ldexp(a + o, -bits) for a, o in zip(n, off, strict=True)]
    estimate = torch.tensor([a if w is None else w for a, w in zip(near, wild, strict=True)], dtype=torch.float64)
    residual_and_back(x, estimate.to(dtype), bits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_a_byte_holds_and_what_it_does_not(dtype):
    """-128 marks an escape, so even a difference of -128 is one; differences that wrap around to a small code are too."""
    differences = [0, 1, -1, 127, -127, 128, -128, 129, -129, 255, 256, 257, -256, 2**16, 2**32, -(2**33) + 5]
    estimate = multiples([5] * len(differences), dtype, 16)
    x = multiples([5], torch.float64, 16) + multiples(differences, torch.float64, 16)
    kept = torch.tensor([abs(d) < 128 for d in differences])
    on_grid = x.to(dtype).double() == x
    residual = residual_and_back(x.to(dtype)[on_grid], estimate[on_grid], 16)
    assert residual.codes.tolist() == [
        d if k else -128 for d, k, o in zip(differences, kept, on_grid, strict=True) if o
    ]
    assert torch.equal(residual.escaped, x.to(dtype)[on_grid & ~kept])


def test_an_estimate_that_is_right_keeps_nothing_but_zeros():
    x = revflow.Grid().round(image(100, dtype=torch.float32))
    residual = residual_and_back(x, x, 16)
    assert not residual.codes.any() and residual.escaped.nelement() == 0


def test_an_estimate_off_the_grid_escapes():
    x = multiples([3, 3, 3], torch.float32, 16)
    assert residual_and_back(x, multiples([3, 2.75, 3.5], torch.float32, 16), 16).codes.tolist() == [0, -128, -128]


def test_escapes_alone_and_all_of_them():
    """The shortcut that finds that nothing escapes looks at both ends and at every code."""
    x = multiples([7] * 33, torch.float32, 16)
    for wild in (torch.nan, torch.inf, 99.0, -99.0, x[0].item() - 2.0**-17, x[0].item() + 128 * 2.0**-16):
        for k in (0, 16, 32):
            assert len(residual_and_back(x, x.index_fill(0, torch.tensor(k), wild), 16).escaped) == 1
        assert len(residual_and_back(x, torch.full_like(x, wild), 16).escaped) == 33


@pytest.mark.parametrize(
    "shaped",
    [
        lambda x: x[0, 0, 0, 0],
        lambda x: x[:0],
        lambda x: x[:, 1:3],
        lambda x: x.transpose(1, 3),
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x[:, :, :1].expand(-1, -1, 5, -1),
    ],
    ids=["0-dim", "empty", "slice", "transposed", "channels_last", "expanded"],
)
def test_residuals_of_any_layout(shaped):
    """About half of the values escape, in layouts that need not be the estimate's."""
    grid = revflow.Grid()
    x = shaped(grid.round(image(2, 4, 6, 5, dtype=torch.float32)))
    estimate = shaped(grid.round(image(2, 4, 6, 5, dtype=torch.float32) + 2e-3 * image(2, 4, 6, 5, seed=2).float()))
    counts = [
        len(residual_and_back(one, other, 16).escaped)
        for one, other in ((x, estimate), (x.contiguous(), estimate), (x, estimate.contiguous()))
    ]
    assert len(set(counts)) == 1 and (0 < counts[0] < x.numel() or x.numel() < 2)


# Fingerprints


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_any_single_bit_changes_the_fingerprint(dtype):
    x = torch.tensor([0.0, -0.0, 1.5, -3e4, torch.nan, 1e-7, torch.inf]).to(dtype)
    width = 8 * x.element_size()
    for k in range(len(x)):
        for bit in range(width):
            flipped = raw(x).clone()
            flipped[k] ^= torch.tensor(1).bitwise_left_shift(bit).to(flipped.dtype)
            assert fingerprint(flipped.view(dtype)) != fingerprint(x), (k, bit)
    assert fingerprint(x).dtype == torch.int64 and fingerprint(x).shape == ()


def test_the_fingerprint_is_that_of_the_values_in_any_layout():
    x = image(2, 4, 6, 5, dtype=torch.float32)
    expected = raw(x).long().sum()
    strided = torch.empty(2, 4, 6, 10)[..., ::2].copy_(x)
    for layout in (x, x.transpose(0, 3), x.to(memory_format=torch.channels_last), strided, x.transpose(1, 2)):
        assert fingerprint(layout) == expected
    assert fingerprint(x[1:, :2, 3:]) == raw(x[1:, :2, 3:]).long().sum()
    assert fingerprint(x[:0]) == 0 and fingerprint(x[0, 0, 0, 0]) == raw(x)[0, 0, 0, 0]


# The range


def outgrown(bits, *streams):
    """(the number of the first stream out of range, what is said of it)."""
    extent = Extent(revflow.Grid(bits))
    for k, stream in enumerate(streams):
        extent.source = str(k), None
        extent.see(stream)
    found = extent.outgrown()
    return found and (int(found[0][0]), found[1])


@carriers
def test_extent_refuses_from_the_limit_on(dtype, bits):
    """What is at the limit may be a sum that was rounded to it."""
    most = 2 ** SIGNIFICANDS[dtype]
    for sign in (1, -1):
        inside, at = multiples([0, sign * (most - 1)], dtype, bits), multiples([sign * most, 0], dtype, bits)
        assert outgrown(bits, inside, inside) is None
        assert outgrown(bits, inside, at, inside, 2 * at)[0] == 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_extent_and_what_is_no_number(value):
    stream = torch.tensor([1.0, value, 1e6])
    source, message = outgrown(16, torch.ones(3), torch.zeros(0), stream)
    assert source == 2 and re.search(r"reaches (nan|inf); on a grid of 16 bits float32 .* has diverged", message)


def test_extent_names_the_first_and_speaks_of_its_dtype():
    """Each stream's limit is that of its own dtype."""
    wide, narrow, wild = torch.full((2,), 1e6, dtype=torch.float64), torch.tensor([300.0]), torch.tensor([torch.nan])
    source, message = outgrown(16, wide, narrow, wild)
    assert source == 1 and "reaches 300; on a grid of 16 bits float32 covers values below 256." in message
    assert "Pass float32 streams, net(x.float()), also under autocast" in outgrown(8, torch.tensor([3e4]).half())[1]
    assert outgrown(16) is None and outgrown(16, torch.zeros(3, 0)) is None
    assert outgrown(16, torch.full((2,), 1e6, device="meta")) is None


@deterministic
@example(256.0)
@example(2.0**23 - 1)
@example(2.0**23)
@example(math.nextafter(2.0**40, math.inf))
@given(value=st.floats(256, 2.0**60))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bits_that_are_suggested_hold_the_value(dtype, value):
    """At once, and no grid with one bit more would."""
    bits = 16 if dtype == torch.float32 else 46
    stream = torch.tensor([0.0, -value]).to(dtype)
    found = outgrown(bits, stream)
    if found is None:
        return
    suggestion = re.search(r"exact=revflow.Grid\(bits=(\d+)\) would cover this one", found[1])
    if suggestion is None:
        assert outgrown(1, stream) is not None
        return
    enough = int(suggestion[1])
    assert enough < bits and outgrown(enough, revflow.Grid(enough).round(stream)) is None
    assert outgrown(enough + 1, stream) is not None


def test_extent_forgets_what_it_has_said():
    extent = Extent(revflow.Grid())
    extent.see(torch.tensor([300.0]))
    assert extent.outgrown() is not None and extent.outgrown() is None


@pytest.mark.parametrize("bits", [0, -3, 53, 16.0, "16", None])
def test_bits_that_no_grid_has(bits):
    with pytest.raises(ValueError, match=rf"whole number from 1 to 52; got {bits!r}"):
        revflow.Grid(bits)


def test_a_grid_is_a_value():
    assert revflow.Grid() == revflow.Grid(16) != revflow.Grid(17) and len({revflow.Grid(), revflow.Grid(16)}) == 1
    assert revflow.Grid(52).unit == 2.0**-52 and repr(revflow.Grid(9)) == "Grid(bits=9)"
