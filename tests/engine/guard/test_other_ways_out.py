"""Results that leave a conditioner by another way than its return value: refused with the place, or without a graph no fault."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

import revflow
from engine.against_plain import Body, Halved, assert_right, chain, frames, recurrence, squared, through_time


class Auxiliary(Body):
    keep = staticmethod(lambda self, loss: setattr(self, "loss", loss))

    def forward(self, x):
        out = super().forward(x)
        self.keep(self, out.square().mean())
        return out


class InAList(Auxiliary):
    keep = staticmethod(lambda self, loss: self.losses.append(loss))

    def __init__(self, outputs=4):
        super().__init__(outputs)
        self.losses = []


class Holder:
    pass


class InAnObject(Auxiliary):
    keep = staticmethod(lambda self, loss: setattr(self.held, "loss", loss))

    def __init__(self, outputs=4):
        super().__init__(outputs)
        self.held = Holder()


class Inside(nn.Module):
    def __init__(self, outputs=4):
        super().__init__()
        self.inner = Auxiliary(outputs)

    def forward(self, x):
        return self.inner(x)


PLACES = {Auxiliary: r"Auxiliary\.loss", InAList: r"InAList\.losses\[\d\]", InAnObject: r"InAnObject\.held\.loss"}
PLACES[Inside] = r"Auxiliary\.loss"
NETS = {
    "additive": lambda make: chain(make),
    "affine": lambda make: chain(lambda: Halved(make(8)), coupling=revflow.AffineCoupling),
    "budget": lambda make: chain(make, memory_budget="1kB"),
    "chunks": lambda make: chain(make, chunks=2),
}


@pytest.mark.filterwarnings("ignore:memory_budget")
@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("make", PLACES, ids=lambda m: m.__name__)
def test_a_loss_in_an_attribute_is_refused_with_its_place(make, kind):
    loss = NETS[kind](make)(frames()).sum()
    with pytest.raises(RuntimeError, match=rf"block \d .*attribute {PLACES[make]}.*stream of its own"):
        loss.backward()


@pytest.mark.parametrize("states", ["kept", 2])
def test_a_loss_in_an_attribute_of_a_recurrence(states):
    loss = through_time()(recurrence(Auxiliary, states))
    with pytest.raises(RuntimeError, match=r"cell 1 .*attribute Auxiliary\.loss.*stream of its own"):
        loss.backward()


def test_the_same_without_a_graph_is_right():
    class Detached(Auxiliary):
        keep = staticmethod(lambda self, loss: setattr(self, "loss", loss.detach()))

    x = frames()
    net = chain(Detached)
    assert_right(net, squared(x), [x], steps=2)
    torch.testing.assert_close(net[0].F.loss, net[0].F(x.chunk(2, -1)[1]).square().mean().detach())


EVERYTHING = []


def into_a_global(module, inputs, output):
    EVERYTHING.append(output)


@pytest.mark.parametrize("kind", ["hook", "global", "closure", "block of one's own"])
def test_features_that_are_kept_outside_are_refused(kind):
    EVERYTHING.clear()
    kept = {}
    if kind == "closure":

        class Telling(Body):
            def forward(self, x):
                kept["hidden"] = torch.tanh(self.first(x))
                return self.last(kept["hidden"])

        net = chain(Telling)
    elif kind == "block of one's own":

        class Scale(revflow.Bijection):
            def __init__(self):
                super().__init__()
                self.log = nn.Parameter(torch.zeros(1))

            def forward(self, *streams, **context):
                kept["out"] = streams[0] * self.log.exp()
                return (kept["out"], *streams[1:])

            def inverse(self, *streams, **context):
                return (streams[0] / self.log.exp(), *streams[1:])

        net = revflow.ReversibleSequence([Scale() for _ in range(3)], split_dim=-1).double()
    else:
        net = chain(Body)
        hook = into_a_global if kind == "global" else lambda m, i, o: kept.update(feature=o)
        for block in net:
            block.F.first.register_forward_hook(hook)
    loss = net(frames()).sum()
    with pytest.raises(RuntimeError, match=r"block \d .*tensor of shape \(6, \d\) .*still held.*stream of its own"):
        loss.backward()


class Switched(Body):
    """Keeps what it computes once somebody asks for it."""

    def __init__(self):
        super().__init__()
        self.switch = False

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        if self.switch:
            EVERYTHING.append(hidden)
        return self.last(hidden)


@pytest.mark.parametrize("values", [(False, True), ("", "all"), (None, "all")], ids=str)
@pytest.mark.parametrize("make", [lambda m: (chain(m), squared(frames())), lambda m: (recurrence(m), through_time())])
def test_features_that_are_kept_from_the_fifth_step_on(make, values):
    net, loss_of = make(Switched)
    bodies = [m for m in net.modules() if isinstance(m, Switched)]
    for step in range(5):
        EVERYTHING.clear()
        for body in bodies:
            body.switch = values[step == 4]
        loss = loss_of(net)
        with pytest.raises(RuntimeError, match=r"still held") if step == 4 else nullcontext():
            loss.backward()


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def test_what_an_autograd_function_makes():
    class Telling(Body):
        def forward(self, x):
            EVERYTHING.append(Doubled.apply(self.first(x)))
            return self.last(torch.tanh(EVERYTHING[-1]))

    for net, loss_of in ((chain(Telling), squared(frames())), (recurrence(Telling), through_time())):
        EVERYTHING.clear()
        loss = loss_of(net)
        with pytest.raises(RuntimeError, match=r"\(by DoubledBackward\) that is still held"):
            loss.backward()


def test_features_without_a_graph_are_no_fault():
    kept, x, net = {}, frames(), chain(Body)
    for block in net:
        block.F.first.register_forward_hook(lambda m, i, o: kept.update({m: o.detach()}))
    assert_right(net, squared(x), [x], steps=3)
    assert len(kept) == 6  # and those of the copy


def test_features_of_a_block_are_right_beside_the_output():
    """A forward hook on a block, not inside of it, sees tensors with a graph."""
    x, kept, net = frames(), {}, chain(Body, 4)
    handle = net[1].register_forward_hook(lambda m, i, o: kept.update(out=o))

    def loss_of(given):
        if given is not net:  # a copy has no hook of its own that fills `kept`
            given[1]._forward_hooks.clear()
            given[1].register_forward_hook(lambda m, i, o: kept.update(out=o))
        return given(x).square().sum() + kept["out"][1].sin().sum()

    assert_right(net, loss_of, [x])
    handle.remove()


class Of(nn.Module):
    def __init__(self, index, module):
        super().__init__()
        self.index, self.module = index, module

    def forward(self, *streams):
        return self.module(streams[self.index])


class Penalty(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(x).square().mean(-1, keepdim=True)


@pytest.mark.parametrize("options", [{}, {"chunks": 2}, {"exact": revflow.Grid(30)}, {"memory_budget": "1kB"}])
@pytest.mark.filterwarnings("ignore:memory_budget")
def test_a_stream_collects_auxiliary_losses_with_right_gradients(options):
    torch.manual_seed(1)
    blocks = []
    for _ in range(3):
        first, second = Body(), Body()
        blocks += [revflow.AdditiveCoupling(Of(0, first)), revflow.AdditiveCoupling(Of(1, second))]
        blocks += [revflow.AdditiveCoupling(Of(0, Penalty(second)))]
    net = revflow.ReversibleSequence(blocks, **options).double()
    x = frames()

    def loss_of(given):
        y1, y2, penalty = given((*x.chunk(2, -1), torch.zeros(6, 1, dtype=torch.float64)))
        return (y1 * y2).sum() + 0.1 * penalty.sum()

    assert_right(net, loss_of, [x])
    # The last stream is the sum of what each layer's second body makes of the stream that it was given.
    streams = (*x.detach().chunk(2, -1), torch.zeros(6, 1, dtype=torch.float64))
    total = 0
    for k, block in enumerate(net):
        if k % 3 == 2:
            total = total + block.F.module(streams[1])
        streams = block(*streams)
    if "exact" not in options:
        torch.testing.assert_close(streams[2], total)
