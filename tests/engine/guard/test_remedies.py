"""Errors of two conditioners, own blocks and recurrences name the reason and the remedy; who follows the remedy is right."""

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import revflow
from engine.against_plain import Body, assert_right, chain, frames, recurrence, squared, through_time
from engine.kinds import NETS, Own, nets, two

pytestmark = pytest.mark.filterwarnings("ignore:memory_budget", "ignore:None of the inputs have requires_grad")
NO_GRADIENTS = (
    r"evaluations runs without gradients\. Compute gradients inside a conditioner within `with torch\.enable_grad\(\):`"
)


def checkpointed(use_reentrant):
    class Checkpointed(Body):
        def forward(self, x):
            return self.last(torch.tanh(checkpoint(self.first, x, use_reentrant=use_reentrant)))

    return Checkpointed


@pytest.mark.parametrize("kind", [k for k in NETS if "budget" not in k])
def test_a_reentrant_checkpoint(kind):
    loss = NETS[kind](checkpointed(True))(frames()).sum()
    with pytest.raises(RuntimeError, match=r"block 2 .*use_reentrant=True.*pass use_reentrant=False"):
        loss.backward()
    x = frames()
    assert_right(NETS[kind](checkpointed(False)), squared(x), [x])


class Kick(Body):
    """The force of a potential, which a conditioner derives."""

    def forward(self, q):
        q = q.view_as(q) if q.requires_grad else q.detach().requires_grad_()
        return torch.autograd.grad(super().forward(q).square().sum(), q, create_graph=True)[0]


class KickWithGrad(Kick):
    def forward(self, q):
        with torch.enable_grad():
            return super().forward(q)


FORCED = [k for k in NETS if k.startswith(("two", "own"))]


@pytest.mark.parametrize("kind", FORCED)
def test_a_gradient_in_a_conditioner(kind):
    if "budget" not in kind:  # the step that is measured has a graph
        with pytest.raises(RuntimeError, match=rf"block 0 .*{NO_GRADIENTS}, of an input with requires_grad_\(\)"):
            NETS[kind](Kick)(frames())
    x = frames()
    assert_right(NETS[kind](KickWithGrad), squared(x), [x], steps=2)


class ByFunction(Body):
    def forward(self, q):
        return -torch.func.grad(lambda given: Body.forward(self, given).square().sum())(q)


class ByProduct(Body):
    def forward(self, q):
        return torch.autograd.functional.vjp(lambda g: Body.forward(self, g).square().sum(), q, create_graph=True)[1]


@pytest.mark.parametrize("kind", [k for k in FORCED if "budget" not in k])
@pytest.mark.parametrize("make", [ByFunction, ByProduct])
def test_gradients_by_transforms_need_no_remedy(kind, make):
    x = frames()
    assert_right(NETS[kind](make), squared(x), [x])


@pytest.mark.parametrize("states", ["kept", 2])
def test_a_gradient_in_a_cell(states):
    with pytest.raises(RuntimeError, match=rf"cell 0 .*{NO_GRADIENTS}"):
        through_time()(recurrence(Kick, states))
    assert_right(recurrence(KickWithGrad, states), through_time())


REGISTERED = {
    "hook": lambda hidden: hidden.register_hook(lambda gradient: gradient.clamp(-0.2, 0.2)),
    "retained": lambda hidden: hidden.retain_grad(),
    "backward": lambda hidden: hidden.sum().backward(),
}


def hooking(name, careful):
    class Hooking(Body):
        def forward(self, x):
            hidden = torch.tanh(self.first(x))
            if hidden.requires_grad or not careful:
                REGISTERED[name](hidden)
            return self.last(hidden)

    return Hooking


@pytest.mark.parametrize("kind", [k for k in NETS if "budget" not in k])
@pytest.mark.parametrize("name", REGISTERED)
def test_what_a_hidden_tensor_without_a_graph_cannot_do(kind, name):
    with pytest.raises(
        RuntimeError, match=rf"block 0 .*{NO_GRADIENTS}.*register hooks only if the tensor requires a gradient"
    ):
        NETS[kind](hooking(name, False))(frames())
    if name != "backward":
        x = frames()
        assert_right(NETS[kind](hooking(name, True)), squared(x), [x])


@dataclass(frozen=True, slots=True)
class Frozen:
    scale: Tensor


class Table(Mapping):
    """A mapping of one's own."""

    def __init__(self, scale):
        self._held = {"scale": scale}

    def __getitem__(self, name):
        return self._held[name]

    def __iter__(self):
        return iter(self._held)

    def __len__(self):
        return len(self._held)


class Late:
    __slots__ = ("held",)

    def __init__(self, scale):
        self.held = [{"inner": Frozen(scale)}]


OBJECTS = {
    "frozen dataclass": (Frozen, lambda c: c.scale, r"\(c\.scale\)"),
    "mapping": (Table, lambda c: c["scale"], r"\(c\._held\['scale'\]\)"),
    "slots": (Late, lambda c: c.held[0]["inner"].scale, r"\(c\.held\[0\]\['inner'\]\.scale\)"),
    "in a list": (lambda s: [Frozen(s)], lambda c: c[0].scale, r"\(c\[0\]\.scale\)"),
}


@pytest.mark.parametrize("name", OBJECTS)
@pytest.mark.parametrize("make", [two, lambda make: chain(make, coupling=Own)], ids=["two", "own"])
def test_a_tensor_inside_of_an_object_in_the_context(name, make):
    make_object, scale_of, place = OBJECTS[name]

    class Scaled(Body):
        def forward(self, x, c):
            return super().forward(x) * (c if isinstance(c, Tensor) else scale_of(c))

    scale, x = torch.ones(4, dtype=torch.float64, requires_grad=True), frames()
    message = rf"{place} that needs a gradient.*pass it as a keyword argument by itself"
    with pytest.raises(RuntimeError, match=rf"block 2 .*{message}"):
        make(Scaled)(x, c=make_object(scale)).sum().backward()
    with pytest.raises(RuntimeError, match=rf"cell 1 .*{message}"):
        through_time(c=make_object(scale))(recurrence(Scaled)).backward()
    assert_right(make(Scaled), squared(x, c=scale), [x, scale])
    assert_right(make(Scaled), squared(x, c=make_object(scale.detach())), [x])


@nets
def test_a_tensor_in_an_object_whose_place_is_not_found(kind):
    """The error then names the shape and the remedy."""

    class Scaled(Body):
        def forward(self, x, c):
            return super().forward(x) * c.scale.mean()

    scale = torch.ones(6, dtype=torch.float64, requires_grad=True)
    loss = NETS[kind](Scaled)(frames(), c=torch.distributions.Normal(0 * scale.detach(), scale)).sum()
    if "budget" in kind:
        return  # some blocks store their activations in this step
    with pytest.raises(
        RuntimeError, match=r"block 2 .*shape \(6,\).*pass it by itself as a keyword argument of the call"
    ):
        loss.backward()


def test_a_keyword_argument_that_one_of_two_conditioners_does_not_take():
    class Scaled(Body):
        def forward(self, x, scale):
            return super().forward(x) * scale

    torch.manual_seed(0)
    block = revflow.AdditiveCoupling(Scaled(), nn.Sequential(nn.Linear(4, 4)))
    net = revflow.ReversibleSequence([block], split_dim=-1).double()
    with pytest.raises(TypeError, match=r"block 0 .*unexpected keyword argument 'scale'.*reach every conditioner"):
        net(frames(), scale=torch.ones(4, dtype=torch.float64))
