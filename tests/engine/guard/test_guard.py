"""The guard: planted faults are found, healthy training passes without an alarm."""

import copy
import pickle
import random
import re
import warnings

import pytest
import torch
from torch import nn

import revflow
from engine.nets import (
    Conditioner,
    Scale,
    additive,
    additive_two,
    affine,
    gated,
    gated_two,
    image,
    mixed,
    relative_error,
)
from revflow._guard.sequences import witness_of

MODES = ["float32", "autocast"]
modes = pytest.mark.parametrize("mode", MODES)


def chain(*blocks, guard="warn"):
    return revflow.ReversibleSequence(blocks, guard=guard)


def step(net, x, mode="float32", between=lambda: None):
    """Forward and backward; `between` runs between the two."""
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        y = net(x)
    between()
    y.square().mean().backward()


def frames(*shape, seed=1):
    return image(*(shape or (2, 8, 6, 4)), dtype=torch.float32, seed=seed)


def found_at(position, error=revflow.ReconstructionError, remedy=""):
    """The alarm, which names the block and says what to do."""
    context = pytest.raises if error is revflow.ReconstructionError else pytest.warns
    return context(error, match=rf"(?s)^block {position} \(.*{remedy}")


# Inverses that are wrong


class WrongSign(revflow.AdditiveCoupling):
    @staticmethod
    def separate(y, shift):
        return y + shift


class WrongFactor(revflow.AdditiveCoupling):
    @staticmethod
    def separate(y, shift):
        return (y - shift) * 1.001


class NoInverse(Scale):
    def inverse(self, *streams, **context):
        return streams


class NotANumber(Scale):
    def inverse(self, *streams, **context):
        return tuple(s * torch.nan for s in streams)


VERIFY = r"inverse does not invert its forward.*revflow\.verify"


@modes
@pytest.mark.parametrize("position", [0, 2, 4])
@pytest.mark.parametrize("fault", [lambda: WrongSign(Conditioner(4)), NoInverse, NotANumber])
def test_wrong_inverse(fault, position, mode):
    torch.manual_seed(0)
    blocks = [fault() if k == position else additive(4) for k in range(5)]
    with found_at(position, remedy=VERIFY):
        step(chain(*blocks), frames(), mode)


@pytest.mark.parametrize("position", [0, 2, 4])
def test_inverse_wrong_by_a_thousandth_is_a_warning(position):
    torch.manual_seed(0)
    blocks = [WrongFactor(Conditioner(4)) if k == position else additive(4) for k in range(5)]
    with found_at(position, revflow.ReconstructionWarning, VERIFY):
        step(chain(*blocks), frames())


def test_wrong_inverse_of_blank_and_of_sparse_images():
    """Where the input tells nothing of its size, the output does: x + 2 F(x) in the place of x is an error of about 2."""
    sparse = torch.zeros(2, 8, 16, 16).index_put((torch.tensor(1), torch.tensor(3)), torch.tensor(1.0))
    for x, error in ((torch.zeros(2, 8, 6, 4), r"error of (1\.[5-9]|2\.0)e\+00.*"), (sparse, "")):
        torch.manual_seed(0)
        with found_at(0, remedy=error + VERIFY):
            step(chain(WrongSign(Conditioner(4))), x)


def test_wrong_inverse_in_the_other_direction():
    class WrongWay(revflow.AdditiveCoupling):
        """The engine undoes `inverse` by `combine`."""

        @staticmethod
        def separate(y, shift):
            return y + shift

    torch.manual_seed(0)
    net = chain(*(additive(4) for _ in range(3)), WrongWay(Conditioner(4)), additive(4))
    with found_at(3, remedy=VERIFY):
        net.inverse(frames()).square().mean().backward()


def test_a_fault_before_a_mild_one_is_still_raised():
    """The first block beyond `warn` is not the end of it: here block 1 is beyond `error`."""
    torch.manual_seed(0)
    net = chain(additive(4), WrongSign(Conditioner(4)), additive(4), WrongFactor(Conditioner(4)))
    with found_at(1, remedy=VERIFY):
        step(net, frames())
    net = chain(*net, guard="raise")
    with found_at(3, remedy=VERIFY):
        step(net, frames())


def test_a_fault_in_one_of_two_conditioners_and_in_either_stream():
    for k in (0, 1):
        torch.manual_seed(0)
        streams = [frames(2, 4, 6, 4), frames(2, 4, 6, 4, seed=2)]

        class OneStream(Scale):
            def inverse(self, *streams, k=k, **context):
                streams = list(super().inverse(*streams))
                streams[k] = streams[k] * 1.5
                return tuple(streams)

        y1, y2 = chain(additive_two(4), OneStream(), additive_two(4))(tuple(streams))
        with found_at(1, remedy=VERIFY):
            (y1.square().mean() + y2.square().mean()).backward()


class Off(Scale):
    """Its inverse is wrong by a thousandth; of all streams but the first it does nothing."""

    def forward(self, x, *rest):
        return x * self.log_scale.exp().to(x.dtype), *rest

    def inverse(self, x, *rest):
        return x * (-self.log_scale).exp().to(x.dtype) * 1.001, *rest


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64, torch.complex64])
def test_another_stream_does_not_dull_the_guard(dtype):
    y, _ = chain(Off())((frames(), torch.ones(2, 3).to(dtype)))
    with found_at(0, revflow.ReconstructionWarning, "warns from 1e-04"):
        y.sum().backward()


@pytest.mark.parametrize("streams", [(frames().bfloat16(),), (frames(), frames().bfloat16())])
def test_a_stream_of_low_precision_does(streams):
    chain(Off(), guard="raise")(streams)[0].sum().backward()


def test_complex_streams():
    with found_at(0, revflow.ReconstructionWarning, "warns from 1e-04"):
        chain(Off())((frames() + 1j,))[0].abs().sum().backward()


def test_a_conditioner_of_low_precision_does_for_its_block_and_those_before():
    class Low(Conditioner):
        def forward(self, x):
            return super().forward(x.bfloat16()).float()

    torch.manual_seed(0)
    low, full = WrongFactor(Low(4).bfloat16()), WrongFactor(Conditioner(4))
    step(chain(low, guard="raise"), frames())
    step(chain(full, low, guard="raise"), frames())
    with found_at(1, revflow.ReconstructionWarning, "warns from 1e-04"):
        step(chain(low, full), frames())


def test_zeros_that_are_not_rebuilt():
    class Shifted(Scale):
        def inverse(self, *streams):
            return tuple(s + 1 for s in streams)

    with found_at(0, remedy=VERIFY):
        step(chain(Shifted()), torch.zeros(2, 8, 6, 4))


def test_infinite_values_beside_those_that_are_kept():
    class Pole(Scale):
        def inverse(self, *streams):
            rebuilt = super().inverse(*streams)
            rebuilt[0].view(-1)[1] = torch.inf  # the first stride is larger
            return rebuilt

    with found_at(0, remedy="error of inf"):
        step(chain(Pole()), frames())


# Conditioners that give another result the second time


class Drawing(Conditioner):
    """With a random factor that the engine does not know of."""

    def __init__(self, draw, outputs=1):
        super().__init__(4, outputs)
        self.draw = draw

    def forward(self, x):
        out = super().forward(x)
        factor = 8 * self.draw() - 4
        return out * factor if self.outputs == 1 else tuple(t * factor for t in out)


class Stateful(Conditioner):
    """With a running scale that is no buffer."""

    def __init__(self, outputs=1):
        super().__init__(4, outputs)
        self.scale = torch.tensor(8.0)

    def forward(self, x):
        self.scale.mul_(0.5)
        out = super().forward(x)
        return out * self.scale if self.outputs == 1 else tuple(t * self.scale for t in out)


def private_generator():
    generator = torch.Generator().manual_seed(1)
    return lambda: torch.rand((), generator=generator)


COUPLINGS = {"additive": (revflow.AdditiveCoupling, 1), "affine": (revflow.AffineCoupling, 2)}
COUPLINGS["gated"] = (revflow.GatedCoupling, 2)
KINDS = {
    "python": lambda outputs: Drawing(random.Random(1).random, outputs),
    "generator": lambda outputs: Drawing(private_generator(), outputs),
}


@modes
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("conditioners", [1, 2])
def test_conditioner_that_gives_another_result_the_second_time(conditioners, coupling, kind, mode):
    torch.manual_seed(0)
    make, outputs = COUPLINGS[coupling]
    make_good = {"additive": additive, "affine": affine, "gated": gated}[coupling]
    parts = [KINDS[kind](outputs), Conditioner(4, outputs)][:conditioners]
    net = chain(make_good(4), make_good(4), make(*parts), make_good(4), guard="raise")
    with found_at(2, remedy="gave another result the second time.*random numbers.*revflow.verify"):
        step(net, frames(), mode)


@modes
@pytest.mark.parametrize("outputs", [1, 2])
def test_a_conditioner_that_changes_its_own_tensor_in_place_is_refused_at_once(outputs, mode):
    make = revflow.AdditiveCoupling if outputs == 1 else revflow.AffineCoupling
    net = chain(additive(4), make(Stateful(outputs)), guard="off")
    with pytest.raises(
        RuntimeError, match=r"block 1 .*changes its own tensor Stateful\.scale in place.*register_buffer"
    ):
        step(net, frames(), mode)


def test_random_numbers_of_pytorchs_default_generator_are_no_fault():
    torch.manual_seed(0)
    step(chain(revflow.AdditiveCoupling(Drawing(lambda: torch.rand(()))), additive(4, dropout=0.5)), frames())


@modes
@pytest.mark.parametrize("make", [additive, affine, gated, gated_two], ids=lambda m: m.__name__)
def test_optimizer_step_between_forward_and_backward(make, mode):
    """Writes to `.data` raise no version counter: PyTorch does not see them."""
    torch.manual_seed(0)
    net = chain(*(make(4) for _ in range(3)))

    def write():
        for p in net.parameters():
            p.data.add_(0.3)

    with found_at(2, remedy="parameters changed between the forward and the backward"):
        step(net, frames(), mode, write)


# Drift


class Growing(nn.Module):
    def __init__(self, by):
        super().__init__()
        self.conv, self.by = nn.Conv2d(4, 4, 3, padding=1), by

    def forward(self, x):
        return self.by * self.conv(x)


def growing(depth, by, guard="warn"):
    torch.manual_seed(0)
    return chain(*(revflow.AdditiveCoupling(Growing(by)) for _ in range(depth)), guard=guard)


DRIFT = "Normalize inside the conditioners"


class TestDrift:
    def test_past_error(self):
        """|y| is 3e8 |x|: of x nothing is left."""
        with found_at(r"\d+", remedy=f"Rounding errors grow from block to block. {DRIFT}"):
            step(growing(24, 4), frames())

    def test_past_warn(self):
        net, x = growing(12, 3.3), frames()
        with pytest.warns(revflow.ReconstructionWarning, match=f"relative to the sequence's input.*{DRIFT}"):
            step(net, x)

    def test_output_that_dwarfs_the_input(self):
        """Small beside the output, the error is large beside the input."""
        with found_at(r"\d", remedy=f"relative to the sequence's input.*digits are lost.*{DRIFT}"):
            step(growing(12, 4), frames())

    def test_float64_bears_it(self):
        net, x = growing(12, 4).double(), image()
        step(net, x)

    def test_normalized_it_is_none(self):
        torch.manual_seed(0)
        net = chain(*(revflow.AdditiveCoupling(nn.Sequential(Growing(4), nn.GroupNorm(2, 4))) for _ in range(24)))
        step(net, frames())

    def test_under_autocast(self):
        with found_at(r"\d+", remedy="guard warns from 2e-02 and raises from 1e-01. Rounding errors grow"):
            step(growing(24, 8), frames(), "autocast")


def test_blocks_that_are_all_a_little_wrong_are_no_drift():
    class Off(revflow.AdditiveCoupling):
        @staticmethod
        def separate(y, shift):
            return y - (1 + 3e-4) * shift

    torch.manual_seed(0)
    net = chain(*(Off(Conditioner(4)) for _ in range(8)))
    named = r"The first block that was inverted already had an error of [1-9]e-05, which is more than rounding\..*does not invert"
    with pytest.warns(revflow.ReconstructionWarning, match=named):
        step(net, frames())


def test_bfloat16_streams_are_one_warning():
    torch.manual_seed(0)
    net = chain(*(additive(4) for _ in range(240))).bfloat16()
    with pytest.warns(
        revflow.ReconstructionWarning, match=r"torch\.bfloat16 lose digits.*Pass float32 streams"
    ) as seen:
        for _ in range(3):
            step(net, frames().bfloat16())
    assert len(seen) == 1


# What is done about it


class TestModes:
    def mild(self, guard, depth=3):
        torch.manual_seed(0)
        return chain(*(WrongFactor(Conditioner(4)) for _ in range(depth)), guard=guard)

    def severe(self, guard):
        torch.manual_seed(0)
        return chain(additive(4), WrongSign(Conditioner(4)), guard=guard)

    def test_warn_warns_once_a_sequence_and_raises_every_time(self):
        nets = [self.mild("warn"), self.mild("warn")]
        with pytest.warns(revflow.ReconstructionWarning, match="once for a sequence") as seen:
            for net in nets * 3:
                step(net, frames())
        assert len(seen) == 2
        net = self.severe("warn")
        for _ in range(2):
            with found_at(1):
                step(net, frames())

    def test_warn_is_the_default(self):
        with found_at(0):
            step(revflow.ReversibleSequence([WrongSign(Conditioner(4))]), frames())
        with pytest.warns(revflow.ReconstructionWarning):
            step(revflow.ReversibleSequence([WrongFactor(Conditioner(4))]), frames())

    def test_raise_raises_at_the_first_threshold_every_time(self):
        net = self.mild("raise")
        for _ in range(2):
            with found_at(2, remedy="an error of [1-9].*e-0[34], .* warns from 1e-04 and raises from 1e-02"):
                step(net, frames())

    def test_off_says_nothing(self):
        for net in (self.mild("off"), self.severe("off"), chain(NotANumber(), guard="off")):
            step(net, frames())

    @pytest.mark.parametrize("guard", ["error", "", None, True])
    def test_another_value_is_refused(self, guard):
        with pytest.raises(ValueError, match=re.escape(f'"warn", "raise" or "off"; got {guard!r}')):
            revflow.ReversibleSequence([], guard=guard)

    def test_copies_and_slices_keep_the_mode(self):
        for net, error in ((self.mild("raise"), revflow.ReconstructionError), (self.mild("off"), None)):
            for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), net[1:]):
                assert f'guard="{"off" if error is None else "raise"}"' in repr(twin)
                if error is None:
                    step(twin, frames())
                else:
                    with pytest.raises(error):
                        step(twin, frames())

    def test_a_partial_gradient_names_its_own_first_block(self):
        """The rewind stops at block 2; blocks 1 and 0 are not judged."""
        torch.manual_seed(0)
        net = chain(additive(4), WrongSign(Conditioner(4)), additive(4), additive(4))
        torch.autograd.grad(net(frames()).sum(), list(net[2].parameters()))
        with found_at(1):
            torch.autograd.grad(net(frames()).sum(), list(net[1].parameters()))

    def test_every_backward_of_a_retained_graph_is_judged(self):
        torch.manual_seed(0)
        net = chain(*(additive(4) for _ in range(3)))
        loss = net(frames()).sum()
        loss.backward(retain_graph=True)
        for p in net.parameters():
            p.data.add_(0.3)
        with found_at(2):
            loss.backward()


# No alarm where nothing is wrong; warnings of revflow are errors in these tests


class TestHealthy:
    @pytest.mark.parametrize("make", [additive, additive_two, gated, gated_two], ids=lambda m: m.__name__)
    @pytest.mark.parametrize("mode", [*MODES, "float64"])
    def test_depth(self, make, mode):
        torch.manual_seed(0)
        net, x = chain(*(make(4) for _ in range(36)), guard="raise"), frames()
        if mode == "float64":
            net, x = net.double(), x.double()
        for seed in range(3):
            step(net, x * 10.0 ** (seed - 1), mode)

    def test_streams_that_are_larger_inside(self):
        torch.manual_seed(0)
        net = chain(Scale(), additive(4), additive(4), Scale(), guard="raise")
        for block, log_scale in ((net[0], 14.0), (net[3], -14.0)):
            block.log_scale.data.fill_(log_scale)
        step(net, frames())

    def test_every_kind_of_block(self):
        torch.manual_seed(0)
        net = chain(*mixed(dropout=0.3), guard="raise")
        for mode in MODES:
            x = frames().requires_grad_()
            step(net, x, mode)

    @pytest.mark.parametrize("mode", MODES)
    def test_blank_and_sparse_images(self, mode):
        torch.manual_seed(0)
        net = chain(*(additive(4) for _ in range(12)), guard="raise")
        dark = (torch.rand(4, 8, 16, 16) < 0.01).float() / 255
        for x in (torch.zeros(4, 8, 16, 16), dark, 255 * dark, 255 * 255 * dark, 1e-9 * frames(4, 8, 16, 16)):
            step(net, x, mode)

    def test_large_negative_inputs(self):
        torch.manual_seed(0)
        step(chain(*(affine(4) for _ in range(3)), guard="raise"), -1e6 - frames().abs())

    def test_bumps_with_tails_that_fade_to_nothing(self):
        """Most values, those that are kept among them, are tiny beside the largest."""
        grid = torch.arange(64.0)
        for seed in range(20):
            torch.manual_seed(seed)
            x0, y0 = torch.rand(2) * 64
            x = torch.exp(-((grid[:, None] - x0) ** 2 + (grid - y0) ** 2) / 8).expand(1, 4, 64, 64)
            step(chain(*(additive(2) for _ in range(3)), guard="raise"), x)

    def test_streams_of_several_kinds(self):
        """Shapes, precisions, complex numbers, integers, no elements at all; the least precise counts."""

        class Mixed(Scale):
            def forward(self, x, *rest):
                return x * self.log_scale.exp(), *rest

            def inverse(self, x, *rest):
                return x * (-self.log_scale).exp(), *rest

        others = [torch.arange(5), torch.zeros(0), torch.ones(3).bfloat16(), torch.ones(2, dtype=torch.complex64)]
        for other in others:
            y, _ = chain(Mixed(), Mixed(), guard="raise")((frames(), other))
            y.sum().backward()
        step(chain(*(additive(4) for _ in range(3)), guard="raise"), frames(0, 8, 6, 4))

    def test_number_of_streams_that_changes(self):
        class Split(Scale):
            def forward(self, x):
                return super().forward(*x.chunk(2, 1))

            def inverse(self, *streams):
                return (torch.cat(super().inverse(*streams), 1),)

        torch.manual_seed(0)
        y1, y2 = chain(Split(), additive(4), additive(4), guard="raise")((frames(),))
        (y1 * y2).sum().backward()

    def test_streams_of_float64_with_conditioners_of_float32(self):
        class Single(Conditioner):
            def forward(self, x):
                return super().forward(x.float()).double()

        torch.manual_seed(0)
        step(chain(*(revflow.AdditiveCoupling(Single(4)) for _ in range(24)), guard="raise"), image())

    def test_input_changed_in_place(self):
        torch.manual_seed(0)
        net, x = chain(*(additive(4) for _ in range(3)), guard="raise"), frames()
        step(net, x, between=lambda: x.zero_())

    def test_overflow_is_not_the_guards_matter(self):
        """As under a GradScaler whose scale is still too high, or with inputs that are not numbers."""
        torch.manual_seed(0)
        net = chain(*(additive(4) for _ in range(3)), guard="raise")
        for factor in (1e38, torch.inf, torch.nan):
            (net(frames()).square().mean() * factor * factor).backward()
            step(net, frames() * factor)

    def test_steps_that_a_grad_scaler_skips(self):
        torch.manual_seed(0)
        net = chain(*(additive(4) for _ in range(6)), guard="raise")
        optimizer, skipped = torch.optim.SGD(net.parameters(), lr=1e-3), 0
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1000, backoff_factor=2.0**-8)
        for _ in range(16):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = net(frames()).square().mean()
            scaler.scale(loss).backward()
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            skipped += scaler.get_scale() < before
        assert 0 < skipped < 16

    def test_fake_and_meta_tensors(self):
        def run():
            step(chain(*(gated(4) for _ in range(2)), Scale(), guard="raise"), torch.randn(2, 8, 6, 4))

        assert revflow.measure_memory(run, predict=True).peak == revflow.measure_memory(run).peak
        step(chain(*(additive(4) for _ in range(2)), guard="raise").to("meta"), frames().to("meta"))


def healthy_steps(count):
    """Train a small network of every kind of block on inputs of every kind."""
    torch.manual_seed(0)
    blocks = [additive(4, dropout=0.2), additive_two(4), affine(4), gated(4, dropout=0.2), Scale(), gated_two(4)]
    blocks[1].F.norm = nn.BatchNorm2d(6)
    net = chain(*blocks)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    losses = []
    for k in range(count):
        noise = torch.randn(4, 8, 8, 8)
        kinds = [
            noise,
            torch.rand_like(noise),
            torch.zeros_like(noise),
            (noise > 2.5).float(),
            noise.round(),
            5 * noise,
        ]
        x = kinds[k % len(kinds)]
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=k % 4 > 1):
            loss = (net(x) - torch.roll(x, 1, 3)).square().mean()
        loss.backward()
        optimizer.step()
        if k % len(kinds) == 0:
            losses.append(loss.item())
    assert sum(losses[-3:]) < sum(losses[:3])


def test_100_healthy_steps_without_an_alarm():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        healthy_steps(100)


@pytest.mark.slow
def test_1000_healthy_steps_without_an_alarm():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        healthy_steps(1000)


# What it keeps, and what it cannot see


def test_values_of_all_places_are_kept_of_a_small_stream():
    for count in [*range(1, 65), 89, 144, 2 * 4 * 6 * 4]:
        witness = witness_of(chain()._guard)
        (kept,) = witness.samples((torch.arange(count).float(),))
        assert len(kept.unique()) == min(count, 64)


def test_off_keeps_nothing():
    def kept(guard):
        torch.manual_seed(0)
        net, x = chain(*(affine(4) for _ in range(4)), guard=guard), frames()
        return revflow.measure_memory(lambda: net(x)).kept

    streams = frames().nbytes
    assert kept("off") == streams < kept("warn") <= streams + 4 * 1024


def test_a_wrong_gradient_inside_a_conditioner_passes_the_guard():
    """It leaves what is rebuilt right. The plain path shares the fault, so finite differences alone would tell."""

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return 2 * gradient

    class Wrong(Conditioner):
        def forward(self, x):
            return Doubled.apply(super().forward(x))

    torch.manual_seed(0)
    net, x = chain(*(revflow.AdditiveCoupling(Wrong(4)) for _ in range(3)), guard="raise").double(), image()
    step(net, x)
    found, p = net[0].F.last.bias.grad, net[0].F.last.bias
    plain = torch.autograd.grad(net.plain(x).square().mean(), p)[0]
    differences = torch.zeros_like(p)
    for k in range(len(p)):
        ends = []
        for sign in (1, -1):
            p.data[k] += sign * 1e-6
            ends.append(net.plain(x).square().mean().item())
            p.data[k] -= sign * 1e-6
        differences[k] = (ends[0] - ends[1]) / 2e-6
    assert relative_error(found, plain) < 1e-10
    assert relative_error(found, differences) > 0.5
