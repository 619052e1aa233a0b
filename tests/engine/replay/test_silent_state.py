"""State that evaluations fill and read again: refused with its place, or right; by the twin under standard autograd."""

import copy
from collections import UserDict, defaultdict
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import revflow
from engine.against_plain import Body, Cell, Halved, assert_right, chain, frames, squared, through_time


@dataclass(slots=True)
class Pair:
    keys: Tensor | None = None
    values: Tensor | None = None


class Slotted:
    __slots__ = ("kept", "size")

    def __init__(self):
        self.kept, self.size = {}, 0


class Wrapped(NamedTuple):
    pairs: list


class Attending(Body):
    """Computes keys once and reads them afterwards, as a decoder with a cache: a second evaluation would find them."""

    def __init__(self, read, write, outputs=4):
        super().__init__(outputs)
        self.key, self.access = nn.Linear(4, outputs), (read, write)

    def forward(self, x, cache):
        read, write = self.access
        keys = read(cache)
        if keys is None:
            keys = self.key(x)
            write(cache, keys)
        return super().forward(x) * keys


def item(key):
    return lambda c: c.get(key), lambda c, t: c.update({key: t})


def last_of(find):
    return lambda c: find(c)[-1] if find(c) else None, lambda c, t: find(c).append(t)


def attribute(find, name):
    return lambda c: getattr(find(c), name, None), lambda c, t: setattr(find(c), name, t)


CACHES = {
    "slots": (Slotted, (lambda c: c.kept.get("k"), lambda c, t: c.kept.update(k=t)), r"cache\.kept\['k'\]"),
    "a dataclass with slots": (Pair, attribute(lambda c: c, "keys"), r"cache\.keys"),
    "a named tuple of objects": (
        lambda: Wrapped([Pair()]),
        attribute(lambda c: c.pairs[0], "values"),
        r"cache\[0\]\[0\]\.values",
    ),
    "a namespace": (SimpleNamespace, attribute(lambda c: c, "keys"), r"cache\.keys"),
    "a mapping of the library": (UserDict, item("k"), r"cache\.data\['k'\]"),
    "pairs by layer": (
        dict,
        (lambda c: c.get(0, (None,))[0], lambda c, t: c.update({0: (t, t + 1)})),
        r"cache\[0\]\[\d\]",
    ),
    "lists by layer": (lambda: defaultdict(list), last_of(lambda c: c[0]), r"cache\[0\]\[0\]"),
}

CHAINS = {
    "affine": lambda make: chain(lambda: Halved(make(8)), coupling=revflow.AffineCoupling),
    "gated, budget": lambda make: chain(lambda: Halved(make(8)), coupling=revflow.GatedCoupling, memory_budget="2kB"),
    "exact": lambda make: chain(make, exact=revflow.Grid(30)),
}


@pytest.mark.parametrize("kind", CHAINS)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.filterwarnings("ignore:memory_budget")
def test_a_cache_that_the_first_evaluation_fills_is_refused(cache, kind):
    make, access, place = CACHES[cache]
    net = CHAINS[kind](lambda outputs=4: Attending(*access, outputs))
    with pytest.raises(
        RuntimeError, match=rf"block 0 .*(Attending|Halved) changed .*{place}.*In training pass no cache"
    ):
        net(frames(), cache=make())
    with revflow.ordinary_autograd():
        net(frames(), cache=make()).sum().backward()
    with torch.no_grad():
        net(frames(), cache=make())


@pytest.mark.parametrize("states", ["kept", 2, "offloaded"])
def test_a_cache_in_the_context_of_a_recurrence_is_refused(states):
    make, access, place = CACHES["a dataclass with slots"]
    torch.manual_seed(1)
    net = revflow.ReversibleRecurrence([Cell(Attending(*access))], states=states).double()
    with pytest.raises(RuntimeError, match=f"cell 0 .*changed {place}: state in the context"):
        through_time(cache=make())(net)


def test_the_second_conditioner_of_a_block_is_named_if_it_fills_the_cache():
    class Passing(Body):
        def forward(self, x, cache):
            return super().forward(x)

    make, access, place = CACHES["a namespace"]
    blocks = [revflow.AdditiveCoupling(Passing(), Attending(*access))]
    net = revflow.ReversibleSequence(blocks, split_dim=-1).double()
    with pytest.raises(RuntimeError, match=f"block 0 .*conditioner Attending changed {place}"):
        net(frames(), cache=make())


def test_tensors_that_an_evaluation_takes_from_the_context_are_refused():
    class Taking(Body):
        def forward(self, x, cache):
            return super().forward(x) * cache.kept.pop("scale")

    cache = Slotted()
    cache.kept = {"scale": torch.ones(4, dtype=torch.float64)}
    with pytest.raises(RuntimeError, match=r"block 0 .*changed cache\.kept\['scale'\]: state in the context"):
        chain(Taking)(frames(), cache=cache)


def test_a_cache_that_was_filled_before_is_right():
    """Keys of a prefix, computed outside: read by all conditioners, with gradients to the prefix if they are tensors."""
    read = lambda c: c["k"] * c["o"].keys  # noqa: E731
    net, x = chain(lambda: Attending(read, None)), frames()
    keys = torch.linspace(0, 1, 4, dtype=torch.float64).requires_grad_()
    constant = Pair(torch.linspace(1, 2, 4, dtype=torch.float64))
    assert_right(net, squared(x, cache={"k": keys, "o": constant}), [x, keys], steps=2)


class Cached(Body):
    @cached_property
    def weight(self):
        return self.first.weight.tanh()

    def forward(self, x):
        return self.last(x @ self.weight.T)


class InATuple(Body):
    memo = ()

    def forward(self, x):
        if not self.memo:
            self.memo = (self.first.weight.tanh(), self.first.bias.exp())
        return self.last(x @ self.memo[0].T + self.memo[1])


class InANamespace(Body):
    def __init__(self):
        super().__init__()
        self.memo = SimpleNamespace(weight=None)

    def forward(self, x):
        if self.memo.weight is None:
            self.memo.weight = self.first.weight.tanh()
        return self.last(x @ self.memo.weight.T)


class PerStep(Body):
    """Forgets at the end of each evaluation what it computed at the beginning."""

    def __init__(self):
        super().__init__()
        self.memo = {}

    def weight(self):
        return self.memo.setdefault("w", self.first.weight.tanh())

    def forward(self, x):
        hidden = x @ self.weight().T + x @ self.weight().T.square()
        self.memo.clear()
        return self.last(hidden)


PLACES = {Cached: r"Cached\.weight", InATuple: r"InATuple\.memo\[0\]", InANamespace: r"InANamespace\.memo\.weight"}


@pytest.mark.parametrize("make", PLACES, ids=lambda m: m.__name__)
@pytest.mark.parametrize("options", [{}, {"chunks": 2}, {"exact": revflow.Grid(30)}], ids=str)
def test_a_memo_with_a_graph_is_named(make, options):
    loss = chain(make, **options)(frames()).sum()
    with pytest.raises(RuntimeError, match=rf"block 2 .*attribute {PLACES[make]}.*detach"):
        loss.backward()


@pytest.mark.parametrize("options", [{}, {"chunks": 2}, {"memory_budget": "2kB"}], ids=str)
@pytest.mark.filterwarnings("ignore:memory_budget")
def test_a_memo_that_lives_for_one_evaluation_is_right(options):
    x = frames()
    assert_right(chain(PerStep, **options), squared(x), [x], steps=2)


class Mask(Body):
    """Masks and positions by length, in an object that all conditioners share."""

    def __init__(self, shared):
        super().__init__()
        self.shared = shared

    def forward(self, x):
        n = len(x)
        if n not in self.shared.tables:
            self.shared.tables[n] = torch.ones(n, n, dtype=x.dtype).tril() / n
            self.shared.angles = torch.arange(n, dtype=x.dtype).sin().unsqueeze(1)
        return self.shared.tables[n] @ super().forward(x) + self.shared.angles


@pytest.mark.parametrize("options", [{}, {"exact": revflow.Grid(30)}, {"memory_budget": "2kB"}], ids=str)
@pytest.mark.filterwarnings("ignore:memory_budget")
def test_constants_in_a_shared_object_are_right_for_inputs_of_several_lengths(options):
    shared = SimpleNamespace(tables={}, angles=None)
    net = chain(lambda: Mask(shared), **options)
    for batch in (6, 3):
        x = frames(batch)
        assert_right(net, squared(x), [x], steps=2)
    assert sorted(net[0].F.shared.tables) == [3, 6]


class Averages(Body):
    """Running averages in an object, a list and a dictionary, by rebinding."""

    def __init__(self, outputs=4):
        super().__init__(outputs)
        zero = torch.zeros((), dtype=torch.float64)
        self.kept, self.last_two, self.by_name = Pair(zero, zero), [zero, zero], {"mean": zero}

    def forward(self, x):
        now = x.detach().square().mean()
        self.kept.keys = 0.9 * self.kept.keys + now
        self.last_two = [self.last_two[1], now]
        self.by_name["mean"] = self.by_name["mean"] + now * self.last_two[0]
        return super().forward(x) / (1 + self.kept.keys + self.by_name["mean"])

    def values(self):
        return [self.kept.keys, *self.last_two, self.by_name["mean"]]


AVERAGING = CHAINS | {"additive": chain}
del AVERAGING["gated, budget"]


@pytest.mark.parametrize("kind", AVERAGING)
def test_averages_move_once_per_step(kind):
    net, x = AVERAGING[kind](Averages), frames()
    twin = copy.deepcopy(net)
    for _ in range(3):
        found = []
        for model in (net, twin):
            model.zero_grad()
            with revflow.ordinary_autograd() if model is twin else nullcontext():
                loss = model(x).square().sum()
            loss.backward()
            found.append([p.grad for p in model.parameters()])
            found[-1] += [v for m in model.modules() if isinstance(m, Averages) for v in m.values()]
        for f, e in zip(*found, strict=True):
            torch.testing.assert_close(f, e, rtol=1e-7, atol=1e-7)


IN_PLACE = {
    "of an object": (lambda self: self.kept.keys.add_(1), r"Moving\.kept\.keys"),
    "of a list": (lambda self: self.last_two[1].mul_(0.5), r"Moving\.last_two\[1\]"),
    "of a dictionary": (
        lambda self: torch.add(self.by_name["mean"], 1, out=self.by_name["mean"]),
        r"Moving\.by_name\[",
    ),
}


@pytest.mark.parametrize("kind", IN_PLACE)
def test_a_change_in_place_is_refused_with_its_place(kind):
    change, place = IN_PLACE[kind]

    class Moving(Averages):
        def __init__(self):
            super().__init__()
            self.kept = Pair(torch.zeros(()), torch.zeros(()))
            self.last_two, self.by_name = [torch.zeros(()), torch.zeros(())], {"mean": torch.zeros(())}

        def forward(self, x):
            change(self)
            return Body.forward(self, x)

    with pytest.raises(RuntimeError, match=rf"block 0 .*own tensor {place}.*register_buffer"):
        chain(Moving)(frames())
