"""Networks of every kind of block, made of conditioners that a test brings."""

import pytest
import torch

import revflow
from engine.against_plain import Halved, chain


class Own(revflow.Bijection):
    """A block of one's own around a conditioner."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, a, b, **context):
        return b + self.body(a, **context), a

    def inverse(self, a, b, **context):
        return b, a - self.body(b, **context)


def two(make, **options):
    """Additive couplings with two conditioners each."""
    torch.manual_seed(1)
    blocks = [revflow.AdditiveCoupling(make(), make()) for _ in range(3)]
    return revflow.ReversibleSequence(blocks, split_dim=-1, **options).double()


NETS = {
    "affine": lambda make: chain(lambda: Halved(make(8)), coupling=revflow.AffineCoupling),
    "gated, chunks": lambda make: chain(lambda: Halved(make(8)), coupling=revflow.GatedCoupling, chunks=3),
    "two conditioners": two,
    "two conditioners, exact": lambda make: two(make, exact=revflow.Grid(30)),
    "own block": lambda make: chain(make, coupling=Own),
    "own block, budget": lambda make: chain(make, coupling=Own, memory_budget="1kB"),
}
nets = pytest.mark.parametrize("kind", NETS)
