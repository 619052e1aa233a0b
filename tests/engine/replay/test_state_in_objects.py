"""State that an evaluation leaves in objects: in the context it is refused; in a module's attributes it moves once per step."""

from collections import OrderedDict, deque
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import revflow
from engine.against_plain import Body, Halved, assert_right, chain, frames, recurrence, squared, through_time


class Layer:
    def __init__(self):
        self.keys = None


class Cache:
    """As transformers' DynamicCache: objects in a list."""

    def __init__(self):
        self.layers = [Layer()]


@dataclass(slots=True)
class Slots:
    found: list = field(default_factory=list)


class Storing(Body):
    def __init__(self, store, outputs=4):
        super().__init__(outputs)
        self.store = store

    def forward(self, x, cache):
        out = super().forward(x)
        self.store(cache, out)
        return out


class Output(OrderedDict):
    """As transformers' ModelOutput."""


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("filled", torch.zeros(6, 4, dtype=torch.float64))


CONTEXTS = {
    "a subclass of a dictionary": (Output, lambda c, t: c.update(key=t), r"cache\['key'\]"),
    "a module": (Table, lambda c, t: c.filled.copy_(t.detach()), r"cache\.filled"),
    "the 81st of many layers": (
        lambda: [Layer() for _ in range(100)],
        lambda c, t: setattr(c[80], "keys", t),
        r"cache\[80\]\.keys",
    ),
    "objects in a list": (Cache, lambda c, t: setattr(c.layers[0], "keys", t), r"cache\.layers\[0\]\.keys"),
    "slots": (Slots, lambda c, t: c.found.append(t), r"cache\.found\[0\]"),
    "the caller's list": (list, lambda c, t: c.append(t), r"cache\[0\]"),
    "the caller's dictionary": (dict, lambda c, t: c.update(key=t), r"cache\['key'\]"),
    "in place": (
        lambda: {"filled": Layer()} | {"table": [torch.zeros(6, 4, dtype=torch.float64)]},
        lambda c, t: c["table"][0].copy_(t.detach()),
        r"cache\['table'\]\[0\]",
    ),
}


@pytest.mark.parametrize("kind", CONTEXTS)
@pytest.mark.parametrize("guard", ["warn", "off"])
def test_a_cache_in_the_context_is_refused_in_the_forward_pass(kind, guard):
    make, store, place = CONTEXTS[kind]
    net = chain(lambda: Storing(store), guard=guard)
    with pytest.raises(
        RuntimeError, match=rf"block 0 .*conditioner Storing changed {place}: state in the context.*use_cache"
    ):
        net(frames(), cache=make())


def test_a_cache_in_the_context_of_a_gate_a_block_of_ones_own_and_a_recurrence():
    make, store, place = CONTEXTS["objects in a list"]
    gated = chain(lambda: Halved(Storing(store, 8)), coupling=revflow.GatedCoupling)
    with pytest.raises(RuntimeError, match=f"block 0 .*changed {place}"):
        gated(frames(), cache=make())

    class Own(revflow.Bijection):
        def forward(self, *streams, cache):
            cache.layers[0].keys = streams[0] * 1
            return streams

        def inverse(self, *streams, cache):
            return streams

    with pytest.raises(RuntimeError, match=f"block 0 .*changed {place}"):
        revflow.ReversibleSequence([Own()])(frames(), cache=make())
    with pytest.raises(RuntimeError, match=f"cell 0 .*changed {place}"):
        through_time(cache=make())(recurrence(lambda: Storing(store)))


def test_a_context_that_is_only_read_is_right():
    class Reading(Body):
        def forward(self, x, cache):
            return super().forward(x) + cache.layers[0].keys

    cache, x = Cache(), frames()
    cache.layers[0].keys = torch.randn(4, dtype=torch.float64)
    assert_right(chain(Reading), squared(x, cache=cache), [x])


class Memo(Body):
    """Computes its weights once per step and remembers them."""

    def __init__(self):
        super().__init__()
        self.memo = None

    def forward(self, x):
        if self.memo is None:
            self.memo = self.first.weight.tanh()
        return self.last(x @ self.memo.T)


class InADictionary(Body):
    def __init__(self):
        super().__init__()
        self.memo = {}

    def forward(self, x):
        if "w" not in self.memo:
            self.memo["w"] = self.first.weight.tanh()
        return self.last(x @ self.memo["w"].T)


class InAnObject(Body):
    def __init__(self):
        super().__init__()
        self.memo = Layer()

    def forward(self, x):
        if self.memo.keys is None:
            self.memo.keys = self.first.weight.tanh()
        return self.last(x @ self.memo.keys.T)


@pytest.mark.parametrize("memo", [Memo, InADictionary, InAnObject])
def test_weights_that_are_computed_once_and_remembered_are_not_silently_untrained(memo):
    """They would carry a graph from step to step: the place is named."""
    net = chain(memo)
    y = net(frames())
    with pytest.raises(RuntimeError, match=rf"block 2 .*attribute {memo.__name__}\.memo.*detach"):
        y.sum().backward()


class Rotary(Body):
    """Remembers constants, in the ways of rotary embeddings and masks."""

    def __init__(self):
        super().__init__()
        self.tables, self.table, self.recent = {}, None, deque(maxlen=2)

    def forward(self, x):
        if self.table is None:
            self.table = torch.arange(4, dtype=x.dtype).cos()
        self.tables.setdefault(len(x), torch.arange(4, dtype=x.dtype).sin())
        self.recent.append(torch.ones(()))
        return super().forward(x * self.table) * self.tables[len(x)]


@pytest.mark.parametrize("options", [{}, {"chunks": 2}, {"memory_budget": "2kB"}, {"exact": revflow.Grid(30)}])
def test_constants_that_are_remembered_are_right(options):
    x = frames()
    net = chain(Rotary, **options)
    assert_right(net, squared(x), [x], steps=2)
    assert net[0].F.table is not None and len(net[0].F.tables) >= 1


class Average(Body):
    """A running average that is not a buffer: another tensor takes its place."""

    def __init__(self):
        super().__init__()
        self.mean = torch.zeros((), dtype=torch.float64)

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
        return super().forward(x) + self.mean


@pytest.mark.parametrize("options", [{}, {"memory_budget": "2kB"}, {"exact": revflow.Grid(30)}])
def test_an_average_in_an_attribute_moves_once_per_step(options):
    x, net, twin = frames(), chain(Average, **options), chain(Average, **options)
    assert_right(net, squared(x), [x], steps=3)
    for _ in range(3):
        twin.plain(x)
    for a, b in zip(net, twin, strict=True):
        torch.testing.assert_close(a.F.mean, b.F.mean, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("states", ["kept", 2])
def test_an_average_in_a_recurrence_moves_once_per_step(states):
    assert_right(recurrence(Average, states), through_time(), steps=2)


def test_a_tensor_that_changes_in_place_is_refused_with_its_remedy():
    class InPlace(Average):
        def forward(self, x):
            self.mean.mul_(0.9)
            return Body.forward(self, x) + self.mean

    with pytest.raises(RuntimeError, match=r"block 0 .*own tensor InPlace\.mean in place.*register_buffer"):
        chain(InPlace)(frames())


@pytest.mark.parametrize("of", ["sequence", "recurrence"])
def test_an_average_within_a_checkpoint_is_that_of_the_run_that_is_recomputed(of):
    x = frames()
    if of == "sequence":
        assert_right(chain(Average), lambda net: checkpoint(net, x, use_reentrant=False).square().sum(), [x], steps=2)
    else:
        loss_of = through_time()
        assert_right(recurrence(Average), lambda net: checkpoint(loss_of, net, use_reentrant=False), steps=2)


def test_a_frozen_parameter_that_moves_is_refused_with_its_remedy():
    """A codebook that follows the data."""

    class Codebook(Body):
        def __init__(self):
            super().__init__()
            self.codes = nn.Parameter(torch.ones(4), requires_grad=False)

        def forward(self, x):
            with torch.no_grad():
                self.codes.lerp_(x.mean(0), 0.1)
            return super().forward(x) * self.codes.clone()

    with pytest.raises(RuntimeError, match=r"block 0 .*frozen parameter of shape \(4,\) in place.*register_buffer"):
        chain(Codebook)(frames())
