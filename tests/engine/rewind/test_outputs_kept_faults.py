"""Conditioners that do more than return a result, in blocks that store outputs: right gradients, or an error."""

import random
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import revflow
from engine.against_plain import Body, assert_right, chain, frames, squared
from engine.rewind.outputs_kept import outputs_kept

ESCAPED = "left a conditioner by another way than its result"
GRIDS = pytest.mark.parametrize("options", [{}, {"exact": revflow.Grid(30)}], ids=["floating", "exact"])


@pytest.fixture(autouse=True)
def all_outputs_kept():
    with outputs_kept():
        yield


class FromGenerator(Body):
    """Masks from a random generator that is not torch's; `hidden` are those of its tensors that a graph saves last."""

    kind = torch.float64

    def mask(self, x):
        return torch.tensor([random.random() < 0.5 for _ in range(x.numel())]).view(x.shape).to(self.kind)


class MaskFirst(FromGenerator):
    def forward(self, x):
        return self.last(torch.tanh(self.first(x * self.mask(x))))


class MaskInTheMiddle(FromGenerator):
    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        return self.last(hidden * self.mask(hidden))


class MaskLast(FromGenerator):
    def forward(self, x):
        y = self.last(torch.tanh(self.first(x)))
        return y * self.mask(y)


class MaskLastOnTheLeft(FromGenerator):
    def forward(self, x):
        y = self.last(torch.tanh(self.first(x)))
        return self.mask(y) * y


class BooleanMaskLast(FromGenerator):
    kind = torch.bool

    def forward(self, x):
        y = self.last(torch.tanh(self.first(x)))
        return y.masked_fill(self.mask(y), 0.0)


@GRIDS
@pytest.mark.parametrize("make", [MaskFirst, MaskInTheMiddle, MaskLast, MaskLastOnTheLeft, BooleanMaskLast])
def test_masks_of_an_unknown_generator_are_reported(make, options):
    random.seed(1)
    with outputs_kept():
        loss = squared(frames())(chain(make, **options))
    with pytest.raises(revflow.ReconstructionError, match=r"block 2 .*result the second time"):
        loss.backward()


def test_masks_under_autocast_are_reported():
    random.seed(1)
    net, x = chain(MaskInTheMiddle).float(), frames().float()
    MaskInTheMiddle.kind = torch.float32
    try:
        with torch.autocast("cpu", torch.bfloat16):
            y = net(x)
        with pytest.raises(revflow.ReconstructionError, match=r"block 2 "):
            y.square().sum().backward()
    finally:
        MaskInTheMiddle.kind = torch.float64


def test_a_factor_of_an_unknown_generator_belongs_to_the_graph():
    """It is a number, which the graph of the first evaluation holds. So the gradient is right."""

    class Factor(Body):
        def forward(self, x):
            drawn.append(random.random())
            return drawn[-1] * super().forward(x)

    class Given(Body):
        def forward(self, x):
            return drawn[calls.append(1) or len(calls) - 1] * super().forward(x)

    drawn, calls, x = [], [], frames()
    net, twin = chain(Factor), chain(Given)
    twin.load_state_dict(net.state_dict())
    y = net(x)
    found = torch.autograd.grad(y.square().sum(), [*net.parameters()])
    expected = torch.autograd.grad(twin.plain(x).square().sum(), [*twin.parameters()])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


class Growing(Body):
    """Saves more tensors in each evaluation."""

    def __init__(self):
        super().__init__()
        self.evaluations = 0

    def forward(self, x):
        self.evaluations += 1
        for _ in range(self.evaluations):
            x = torch.tanh(x)
        return super().forward(x)


class Shrinking(Growing):
    def forward(self, x):
        self.evaluations += 1
        for _ in range(3 - self.evaluations):
            x = torch.tanh(x)
        return Body.forward(self, x)


@GRIDS
@pytest.mark.parametrize("make", [Growing, Shrinking])
def test_another_number_of_tensors_is_reported(make, options):
    loss = squared(frames())(chain(make, **options))
    with pytest.raises(revflow.ReconstructionError, match=r"block 2 .*result the second time"):
        loss.backward()


class InAttribute(Body):
    def forward(self, x):
        self.hidden = torch.tanh(self.first(x))
        return self.last(self.hidden)


class OutputInAttribute(Body):
    def forward(self, x):
        self.hidden = self.last(torch.tanh(self.first(x)))
        return self.hidden


class InputInAttribute(Body):
    def forward(self, x):
        self.hidden = x
        return super().forward(x)


class FromParameter(Body):
    def forward(self, x):
        self.hidden = self.first.weight + 1
        return super().forward(x)


class Sum(Body):
    """An operation that saves nothing."""

    def forward(self, x):
        self.hidden = x + self.first.weight.sum()
        return super().forward(x)


@pytest.mark.parametrize("guard", ["off", "warn"])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("make", [InAttribute, OutputInAttribute, InputInAttribute, Sum])
def test_a_loss_of_a_tensor_that_leaves_is_refused(make, alone, guard):
    net = chain(make, guard=guard)
    y = net(frames())
    loss = net[1].F.hidden.square().sum() + (0 if alone else y.square().sum())
    with pytest.raises(RuntimeError, match=f"{ESCAPED}|stores a tensor that needs a gradient in the attribute"):
        loss.backward()


def test_a_tensor_that_depends_only_on_parameters_is_right():
    net, x = chain(FromParameter, guard="off"), frames()
    y, z = net(x), net.plain(x)
    found, expected = (
        torch.autograd.grad(
            out.square().sum() + sum(b.F.hidden.sum() for b in net), [*net.parameters()], retain_graph=True
        )
        for out in (y, z)
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


FEATURES = []


@pytest.mark.parametrize("layer", ["first", "last", None])
def test_features_of_a_forward_hook_are_refused(layer):
    FEATURES.clear()
    net = chain(Body)
    module = net[1].F if layer is None else getattr(net[1].F, layer)
    module.register_forward_hook(lambda m, i, o: FEATURES.append(o))
    loss = net(frames()).sum() + FEATURES[0].square().sum()
    with pytest.raises(RuntimeError, match=f"{ESCAPED}|still held"):
        loss.backward()
    FEATURES.clear()


def hooking(register):
    class Hooking(Body):
        def forward(self, x):
            hidden = torch.tanh(self.first(x))
            register(self, x, hidden)
            return self.last(hidden)

    return Hooking


def clamp(gradient):
    return gradient.clamp(-0.2, 0.2)


HOOKS = {
    "input": lambda m, x, h: x.register_hook(clamp) if x.requires_grad else None,
    "hidden": lambda m, x, h: h.register_hook(clamp) if h.requires_grad else None,
    "hidden node": lambda m, x, h: h.requires_grad and h.grad_fn.register_hook(lambda i, o: tuple(2 * g for g in i)),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_that_a_conditioner_registers_run_once(hook):
    x = frames()
    assert_right(chain(hooking(HOOKS[hook])), squared(x), [x])


def test_hooks_on_parameters_run_once():
    calls = []

    class Hooked(Body):
        def forward(self, x):
            self.first.weight.register_hook(lambda g: calls.append(1))
            return super().forward(x)

    net = chain(Hooked)
    squared(frames())(net).backward()
    assert len(calls) == len(net)
    assert all(len(b.F.first.weight._backward_hooks) == 1 for b in net)


def test_hooks_after_accumulation_run_once():
    net, calls = chain(Body), []
    for p in net.parameters():
        p.register_post_accumulate_grad_hook(lambda p: calls.append(p))
    squared(frames())(net).backward()
    assert len(calls) == len([*net.parameters()])


@pytest.mark.parametrize("guard", ["raise", "warn"])
def test_a_tensor_that_is_no_argument_is_refused(guard):
    scale = torch.full((4,), 2.0, dtype=torch.float64, requires_grad=True)

    class Captures(Body):
        def forward(self, x):
            return super().forward(x * scale)

    loss = squared(frames())(chain(Captures, guard=guard))
    with pytest.raises(RuntimeError, match=r"uses a tensor of shape \(4,\).*neither its parameter nor an argument"):
        loss.backward()


@pytest.mark.parametrize("first", ["known", "foreign"])
def test_a_change_of_the_input_in_place_is_refused(first):
    class InPlace(Body):
        def forward(self, x):
            return super().forward(x.mul_(2))

    net = chain(InPlace if first == "foreign" else lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)))
    with pytest.raises(RuntimeError, match="changed its input in place"):
        net(frames())


def test_a_change_in_place_of_a_saved_tensor_is_refused():
    class Modifies(Body):
        def forward(self, x):
            hidden = torch.exp(self.first(x))
            hidden.mul_(2)
            return self.last(hidden)

    loss = squared(frames())(chain(Modifies))
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()


def test_a_change_in_place_by_the_coupling_is_refused():
    class Eager(revflow.Coupling):
        coefficients = ("shift",)

        @staticmethod
        def combine(x, shift):
            return x + shift.mul_(2)

        @staticmethod
        def separate(y, shift):
            return y - 2 * shift

    with pytest.raises(RuntimeError, match=r"Eager\.combine changed its arguments in place"):
        chain(Body, coupling=Eager)(frames())


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, g):
        (a,), (b,) = ctx.saved_tensors, ctx.saved_tensors
        return g * (a + b)


class Twice(torch.autograd.Function):
    """The identity. Its backward pass begins another one through the same graph."""

    second = None

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        second, Twice.second = Twice.second, None
        if second is not None:
            Twice.found = second()
        return g


class WithTwice(Body):
    def forward(self, x):
        return self.last(Twice.apply(torch.tanh(self.first(x))))


def test_a_pass_within_a_pass_through_the_same_graph():
    net, x = chain(WithTwice, guard="raise"), frames()
    loss = squared(x)(net)
    wanted = [x, *net.parameters()]
    expected = torch.autograd.grad(loss, wanted, retain_graph=True)
    Twice.second = lambda: torch.autograd.grad(loss, wanted, retain_graph=True)
    outer = torch.autograd.grad(loss, wanted, retain_graph=True)
    for a, b, c in zip(expected, outer, Twice.found, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


class OwnFunction(Body):
    def forward(self, x):
        return super().forward(Square.apply(x))


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = revflow.ReversibleSequence(
            [revflow.AdditiveCoupling(nn.Linear(2, 2)) for _ in range(2)], split_dim=-1
        )
        self.last = nn.Linear(4, 4)

    def forward(self, x):
        return self.last(self.inner(x).tanh())


class Checkpointed(Body):
    def forward(self, x):
        return self.last(checkpoint(lambda x: torch.tanh(self.first(x)), x, use_reentrant=False))


class CheckpointedWhole(Body):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


class Catches(Body):
    """Code that catches exceptions must not hide the end of the second evaluation."""

    def forward(self, x):
        try:
            return super().forward(x)
        except Exception:
            return torch.zeros_like(x)
        finally:
            self.first.training = True


class Swallows(Body):
    def forward(self, x):
        y = x
        try:
            y = super().forward(x)
        finally:
            return y  # noqa: B012


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.3, batch_first=True)

    def forward(self, x):
        x = x[None]
        return self.attention(x, x, x)[0][0]


class Dropped(Body):
    def forward(self, x):
        return self.last(nn.functional.dropout(torch.tanh(self.first(x)), 0.5))


class OfConstants(Body):
    """Its output does not depend on its input."""

    def forward(self, x):
        return self.first.bias[:4].expand(x.shape)


@GRIDS
@pytest.mark.parametrize(
    "make",
    [
        OwnFunction,
        Nested,
        Checkpointed,
        CheckpointedWhole,
        Catches,
        Swallows,
        Attention,
        Dropped,
        OfConstants,
        nn.Identity,
    ],
)
def test_gradients_are_right(make, options):
    x = frames()
    assert_right(chain(make, **options), squared(x), [x])


def test_a_reentrant_checkpoint_is_refused():
    class Reentrant(Body):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=True)

    loss = squared(frames())(chain(Reentrant))
    with pytest.raises(RuntimeError, match="use_reentrant"):
        loss.backward()


def test_what_one_block_makes_and_another_reads_is_refused():
    cache = []

    class Writes(nn.Module):
        def forward(self, x):
            cache[:] = [x.tanh()]
            return x.sin()

    class Reads(Body):
        def forward(self, x):
            return super().forward(x * cache[0])

    for writes, reads in (({0, 1}, {1}), ({0}, {0}), ({1}, {1})):
        net = revflow.ReversibleSequence(
            [revflow.AdditiveCoupling(m()) for m in (Writes, Reads)], split_dim=-1
        ).double()
        with outputs_kept(writes | reads):
            loss = squared(frames())(net)
        with pytest.raises(
            RuntimeError, match=f"neither its parameter|a first evaluation computed|still held|{ESCAPED}"
        ):
            loss.backward()


@pytest.mark.parametrize("change", [lambda p: p.requires_grad_(False), lambda p: p.requires_grad_(True)])
def test_a_parameter_that_is_frozen_between_the_passes(change):
    """As without stored outputs."""
    found = []
    for kept in ((), {0, 1, 2}):
        torch.manual_seed(0)
        net, x = chain(Body), frames()
        weight = net[1].F.last.weight.requires_grad_(change(torch.empty(1)).requires_grad is False)
        with outputs_kept(kept):
            loss = squared(x)(net)
        change(weight)
        loss.backward()
        found.append([p.grad for p in net.parameters()])
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_a_parameter_that_changes_between_the_passes_is_refused():
    net = chain(Body)
    loss = squared(frames())(net)
    with torch.no_grad():
        net[1].F.first.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_healthy_steps_give_no_warning():
    torch.manual_seed(0)
    net = chain(Body).float()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(20):
            optimizer.zero_grad()
            net(frames().float()).square().mean().backward()
            optimizer.step()
