"""Exact arithmetic where something is wrong: streams that outgrow the grid, and inputs that are not rebuilt."""

import warnings

import pytest
import torch
from torch import nn

import revflow
from engine.nets import Conditioner, Scale, additive, affine, gated, image

GRID = revflow.Grid()
COUPLINGS = [additive, affine, gated]


def frames(*shape, seed=1):
    return image(*(shape or (2, 8, 6, 4)), seed=seed, dtype=torch.float32)


def chain(*blocks, guard="warn", exact=True):
    return revflow.ReversibleSequence(blocks, guard=guard, exact=exact)


def around(block, guard="warn", make=additive):
    """A chain whose block 2 is this."""
    torch.manual_seed(0)
    return chain(make(), additive(), block, make(), additive(), guard=guard)


# The range


class Constant(nn.Module):
    """Returns its parameter everywhere."""

    def __init__(self, *values):
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values))

    def forward(self, x):
        t = tuple(v.expand_as(x) for v in self.values)
        return t if len(t) > 1 else t[0]


def constant(kind, *values):
    return lambda: kind(Constant(*values))


ways = pytest.mark.parametrize("way", ["tape", "plain", "no_grad", "inverse", "residuals"])


def go(net, x, way):
    with torch.set_grad_enabled(way != "no_grad"):
        functions = {"plain": net.plain, "inverse": net.inverse, "residuals": net.forward_with_residuals}
        return functions.get(way, net)(x)


@ways
@pytest.mark.parametrize(
    "make",
    [
        constant(revflow.AdditiveCoupling, 300.0),
        constant(revflow.AdditiveCoupling, -300.0),
        constant(revflow.AffineCoupling, 0.0, 300.0),
        constant(revflow.GatedCoupling, 0.0, -600.0),
    ],
)
@pytest.mark.parametrize("guard", ["warn", "off"])
def test_a_block_that_outgrows_the_grid_is_named(make, way, guard):
    torch.manual_seed(0)
    blocks = {"first": additive(), "wild": make(), "last": additive()}
    net = revflow.ReversibleSequence(blocks, exact=True, guard=guard)
    message = (
        r"^the output of block wild \(\w+Coupling\) reaches (29[5-9]|30\d|59\d|60\d)[.\d]*; on a grid of 16 bits float32 covers "
        r"values below 256\. exact=revflow\.Grid\(bits=1[45]\) would cover this one\. Or normalize"
    )
    with pytest.raises(OverflowError, match=message):
        go(net, frames(), way)
    go(revflow.ReversibleSequence(blocks, exact=revflow.Grid(13)), frames(), way)


@ways
def test_the_place_of_a_block_that_stands_in_two(way):
    block, x = revflow.AdditiveCoupling(Constant(100.0)), torch.zeros(1, 2)
    net = chain(*[block] * 6)
    with pytest.raises(OverflowError, match=rf"block {1 if way == 'inverse' else 4} .* reaches 300;"):
        go(net, x, way)
    with pytest.raises(OverflowError, match=rf"block {'0.1' if way == 'inverse' else '1.4'} .* reaches 300;"):
        go(chain(net[:3], net[3:]), x, way)


@ways
def test_a_bijection_that_outgrows_the_grid(way):
    torch.manual_seed(0)
    net = chain(additive(), Scale(), additive())
    net[1].log_scale.data.fill_(-6.0 if way == "inverse" else 6.0)
    with pytest.raises(OverflowError, match=r"block 1 \(Scale\) reaches \d+"):
        go(net, frames(), way)


@ways
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (300.0, r"reaches 300;.*exact=revflow\.Grid\(bits=15\) would cover"),
        (-256.0, r"reaches 256;.*Grid\(bits=15\)"),
        (torch.inf, "reaches (inf|nan);.*has diverged, its input has such values"),
        (torch.nan, "reaches nan;.*has diverged"),
    ],
)
def test_an_input_out_of_range(way, value, message):
    """In either stream, and by a single value."""
    net = chain(additive(), additive())
    for place in ((0, 0, 0, 0), (1, 7, 5, 3)):
        x = frames()
        x[place] = value
        with pytest.raises(OverflowError, match=f"^the input {message}"):
            go(net, x, way)


@ways
def test_a_sum_that_is_rounded_to_the_limit_is_refused(way):
    """256 + 2^-16 is 256 in float32: what is rebuilt of it would be wrong by a unit."""
    net = chain(constant(revflow.AdditiveCoupling, (-1 if way == "inverse" else 1) * 2.0**-15)())
    with pytest.raises(OverflowError, match=r"block 0 \(AdditiveCoupling\) reaches 256;"):
        go(net, torch.full((1, 2), 256 - 2.0**-16), way)


@pytest.mark.parametrize("make", COUPLINGS)
def test_right_up_to_the_limit(make):
    """Streams that reach 255 are rebuilt like any others."""
    net, x = chain(make(), make()), frames().clamp(-1, 1)
    x = x / x.abs().max() * 250
    net[0].F.last.bias.data.mul_(0)
    for block in net:
        nn.init.zeros_(block.F.last.weight)
        nn.init.zeros_(block.F.last.bias)
        block.F.last.bias.data[-4:] = 4.0
        if make is gated:
            block.F.last.bias.data[:4] = -20.0
    if make is not affine:
        y = net(x)
        assert 249 < y.abs().max() < 256
    net(x / 2).square().sum().backward()


def test_the_limit_is_that_of_each_streams_dtype():
    class Double(Conditioner):
        def forward(self, x):
            return super().forward(x.float())

    net = chain(revflow.AdditiveCoupling(Double(4)))
    small, large = frames(2, 4, 6, 4), 1e6 * frames(2, 4, 6, 4).double()
    net((small, large))
    with pytest.raises(OverflowError, match="float32 covers values below 256"):
        net((1e6 * small, large))


# The guard


class Noisy(Conditioner):
    """Adds one unit to one value, from a generator that nobody knows of."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.own = torch.Generator().manual_seed(0)

    def noise(self, x):
        place = torch.randint(x.numel(), (1,), generator=self.own)
        return torch.zeros(x.numel()).index_fill(0, place, GRID.unit).view_as(x)

    def forward(self, x):
        out = super().forward(x)
        if self.outputs == 1:
            return out + self.noise(out)
        return *out[:-1], out[-1] + 4 * self.noise(out[-1])  # gates and scales make it smaller


class Stateful(Conditioner):
    """Drifts by 2^-14 a call."""

    count = 0

    def forward(self, x):
        self.count += 1
        out = super().forward(x)
        drift = self.count * 4 * GRID.unit
        return out + drift if self.outputs == 1 else (*out[:-1], out[-1] + drift)


class Shrinking(Scale):
    """Two neighbors become one. (A scale above one parts them, and is exact.)"""

    def __init__(self):
        super().__init__()
        self.log_scale.data.fill_(-0.3)


class Permuted(revflow.Bijection):
    """Its inverse brings all values back, in other places."""

    def forward(self, *streams, **context):
        return tuple(s.roll(1, 3) for s in streams)

    def inverse(self, *streams, **context):
        return tuple(s.roll(1, 3) for s in streams)


class OneBitOff(revflow.Bijection):
    """Its inverse is wrong by a unit, in one value of one stream."""

    def forward(self, *streams, **context):
        return streams

    def inverse(self, x, *rest, **context):
        x = x.clone()
        x[1, 2, 3, 1] += GRID.unit
        return x, *rest


KINDS = {"additive": revflow.AdditiveCoupling, "affine": revflow.AffineCoupling, "gated": revflow.GatedCoupling}
FAULTS = {
    f"{fault.__name__} {name}": lambda fault=fault, kind=kind: kind(fault(4, len(kind.coefficients)))
    for fault in (Noisy, Stateful)
    for name, kind in KINDS.items()
} | {kind.__name__: kind for kind in (Shrinking, Permuted, OneBitOff)}
faults = pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())


def failure(guard, position=2):
    return pytest.raises(
        revflow.ReconstructionError,
        match=rf"^block {position} \(\w+\): its input was not recomputed to the last bit.*revflow\.verify\(net, x\) finds",
    )


@faults
@pytest.mark.parametrize("guard", ["warn", "raise"])
@pytest.mark.parametrize("make", [additive, gated])
def test_a_fault_is_found_at_its_block(fault, guard, make):
    """The last bit of one value is enough."""
    for _ in range(3):
        with failure(guard):
            around(fault(), guard, make)(frames()).square().mean().backward()


@faults
def test_off_is_silent(fault):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        around(fault(), "off")(frames()).square().mean().backward()


def test_a_fault_in_the_inverse_direction():
    with failure("warn"):
        around(revflow.AdditiveCoupling(Noisy(4))).inverse(frames()).square().mean().backward()


def test_the_block_that_is_rewound_first_is_named():
    net = chain(additive(), OneBitOff(), additive(), Permuted(), additive())
    with failure("warn", 3):
        net(frames()).square().mean().backward()


@pytest.mark.parametrize("make", COUPLINGS)
@pytest.mark.parametrize("guard", ["warn", "raise"])
def test_parameters_changed_between_forward_and_backward(make, guard):
    """By 2^-10 of one weight; behind autograd's back, or it would be its own error."""
    net = around(make(), guard)
    loss = net(frames()).square().mean()
    net[2].F.last.bias.data[-1] += 2.0**-10
    with failure(guard):
        loss.backward()
    loss = net(frames()).square().mean()
    with torch.no_grad():
        net[2].F.last.bias[-1] += 2.0**-10
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_fault_that_floating_point_would_let_pass():
    """The same block, the same noise: in floating point it is rounding error."""
    torch.manual_seed(0)
    net = chain(additive(), revflow.AdditiveCoupling(Noisy(4)), additive(), guard="raise", exact=False)
    net(frames()).square().mean().backward()


def test_a_fault_in_large_streams():
    """The few values that are kept may miss it; the sum of all bits does not."""
    for seed in range(3):
        torch.manual_seed(seed)
        fault = revflow.AdditiveCoupling(Noisy(2))
        fault.F.own.manual_seed(seed)
        with failure("warn", 0):
            chain(fault)(frames(1, 4, 40, 50)).square().mean().backward()


def test_small_values_in_other_places():
    """Which the sum of all bits does not tell: the few values are compared bit by bit too."""
    with failure("warn", 0):
        chain(Permuted())((0.01 * frames()).requires_grad_()).square().mean().backward()


def test_what_saved_tensors_hooks_change_is_found():
    net = around(additive())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t + (GRID.unit if t.dim() == 4 else 0)):
        y = net(frames())
    with pytest.raises(revflow.ReconstructionError):
        y.square().mean().backward()


@pytest.mark.parametrize("make", COUPLINGS)
def test_healthy_steps_are_silent(make):
    """Training with dropout and autocast, and zeros, tiny and large inputs among the batches."""
    torch.manual_seed(0)
    net = chain(*(make(dropout=0.2) for _ in range(4)), guard="raise")
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for k in range(12):
            x = (frames(seed=k), 5 * frames(seed=k), torch.zeros(2, 8, 6, 4), 1e-9 * frames(seed=k))[k % 4]
            with torch.autocast("cpu", torch.bfloat16, enabled=k % 3 == 2):
                loss = net(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def test_gradients_that_are_no_numbers_are_not_the_guards_matter():
    net = around(gated())
    (net(frames()).square().mean() * torch.inf).backward()


def test_meta_tensors():
    net = chain(additive(), gated()).to("meta")
    net(frames().to("meta")).sum().backward()
