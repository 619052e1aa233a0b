"""Errors name what happened and what to do, and their remedies are right."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import revflow
from engine.against_plain import Body, Halved, assert_right, chain, frames, recurrence, squared, through_time


class Reentrant(Body):
    use_reentrant = True

    def forward(self, x):
        return self.last(checkpoint(lambda t: torch.tanh(self.first(t)), x, use_reentrant=self.use_reentrant))


class NotReentrant(Reentrant):
    use_reentrant = False


NETS = {
    "additive": lambda make: chain(make),
    "affine": lambda make: chain(lambda: Halved(make(8)), coupling=revflow.AffineCoupling),
    "chunks": lambda make: chain(make, chunks=2),
}
nets = pytest.mark.parametrize("kind", NETS)


@nets
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_reentrant_checkpoint_in_a_conditioner(kind):
    loss = NETS[kind](Reentrant)(frames()).sum()
    with pytest.raises(RuntimeError, match=r"block 2 .*use_reentrant=True.*pass use_reentrant=False"):
        loss.backward()
    x = frames()
    assert_right(NETS[kind](NotReentrant), squared(x), [x])


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_reentrant_checkpoint_in_a_cell():
    loss = through_time()(recurrence(Reentrant))
    with pytest.raises(RuntimeError, match=r"cell 1 .*pass use_reentrant=False"):
        loss.backward()
    assert_right(recurrence(NotReentrant), through_time())


class Force(Body):
    """The gradient of a potential: a Hamiltonian coupling."""

    def forward(self, q):
        q = q if q.requires_grad else q.detach().requires_grad_()
        return -torch.autograd.grad(super().forward(q).sum(), q, create_graph=True)[0]


class ForceWithGrad(Force):
    def forward(self, q):
        with torch.enable_grad():
            return super().forward(q)


@pytest.mark.parametrize("options", [{}, {"chunks": 2}, {"exact": revflow.Grid(30)}, {"memory_budget": "1kB"}], ids=str)
@pytest.mark.filterwarnings("ignore:memory_budget")
def test_a_gradient_in_a_conditioner(options):
    net = chain(Force, **options)
    if "memory_budget" in options:
        net(frames())  # the step that is measured has a graph
    with pytest.raises(RuntimeError, match=r"block 0 .*evaluations runs without gradients.*torch\.enable_grad"):
        net(frames())
    x = frames()
    assert_right(chain(ForceWithGrad, **options), squared(x), [x])


def test_a_gradient_in_a_cell():
    with pytest.raises(RuntimeError, match=r"cell 0 .*torch\.enable_grad"):
        through_time()(recurrence(Force))
    assert_right(recurrence(ForceWithGrad), through_time())


@pytest.mark.parametrize("make", [chain, recurrence])
@pytest.mark.parametrize("of_node", [False, True])
def test_a_hook_on_a_node_in_a_conditioner(make, of_node):
    class Hooking(Body):
        def forward(self, x):
            hidden = torch.tanh(self.first(x))
            if of_node:
                hidden.grad_fn.register_hook(lambda into, out: None)
            else:
                torch.autograd.graph.register_multi_grad_hook([hidden], lambda grads: None)
            return self.last(hidden)

    with pytest.raises(Exception, match=r"(block|cell) 0 .*register hooks only if the tensor requires a gradient"):
        squared(frames())(make(Hooking)) if make is chain else through_time()(make(Hooking))


def test_a_hook_on_a_tensor_in_a_conditioner():
    class Hooking(Body):
        careful = False

        def forward(self, x):
            hidden = torch.tanh(self.first(x))
            if hidden.requires_grad or not self.careful:
                hidden.register_hook(lambda g: g.clamp(-0.1, 0.1))
            return self.last(hidden)

    class Careful(Hooking):
        careful = True

    with pytest.raises(RuntimeError, match=r"block 0 .*register hooks only if the tensor requires a gradient"):
        chain(Hooking)(frames())
    x = frames()
    assert_right(chain(Careful), squared(x), [x])


@dataclass
class Condition:
    scale: Tensor


class Plain:
    def __init__(self, scale):
        self.inner = [Condition(scale)]


class Scaled(Body):
    def forward(self, x, c):
        scale = c.scale if isinstance(c, Condition) else c.inner[0].scale if isinstance(c, Plain) else c
        return super().forward(x) * scale


@pytest.mark.parametrize(("make", "place"), [(Condition, r"c\.scale"), (Plain, r"c\.inner\[0\]\.scale")])
def test_a_tensor_inside_of_an_object_in_the_context(make, place):
    scale, x = torch.ones(4, dtype=torch.float64, requires_grad=True), frames()
    net = chain(Scaled)
    loss = net(x, c=make(scale)).sum()
    with pytest.raises(
        RuntimeError, match=rf"block 2 .*shape \(4,\) \({place}\).*pass it as a keyword argument by itself"
    ):
        loss.backward()
    loss = through_time(c=make(scale))(recurrence(Scaled))
    with pytest.raises(RuntimeError, match=rf"cell 1 .*\({place}\).*by itself"):
        loss.backward()
    assert_right(net, squared(x, c=scale), [x, scale])


def test_a_keyword_argument_that_a_conditioner_does_not_take():
    net = chain(lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
    with pytest.raises(
        TypeError, match=r"block 0 .*unexpected keyword argument 'mask'.*reach every conditioner.*\*\*context"
    ):
        net(frames(), mask=torch.ones(6))


def test_compiled_autograd():
    compiled_autograd = pytest.importorskip("torch._dynamo.compiled_autograd")
    loss = chain(Body)(frames()).sum()
    with (
        compiled_autograd._enable(torch.compile(backend="eager")),
        pytest.raises(RuntimeError, match=r"compiled autograd.*leave it off"),
    ):
        loss.backward()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # other tests look at them
