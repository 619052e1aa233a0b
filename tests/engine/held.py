"""Tensors that somebody holds while a rewind overwrites its own buffers, and chains in which it does."""

import pytest
import torch

import revflow
from engine.exactly import assert_equal
from engine.nets import Scale, additive, additive_two, affine, affine_two, gated, gated_two, image, weighted

# An anchor (a gated block's input) right behind blocks that add: these overwrite what follows, if they may.
CHAINS = {
    "additive": [additive] * 4,
    "additive_two": [additive_two] * 3,
    "anchors": [additive_two, gated, additive, additive, gated_two, affine],
    "mixed": [additive_two, Scale, affine_two, additive, gated],
}
chains = pytest.mark.parametrize("chain", CHAINS)
exactly = pytest.mark.parametrize("exact", [False, True], ids=["rebuilt", "exact"])


def network(chain, exact=False, **options):
    torch.manual_seed(0)
    made = [make() for make in CHAINS[chain] if not (exact and make is Scale)]
    return revflow.ReversibleSequence(made, exact=exact, **options).double()


def of(*blocks, **options):
    torch.manual_seed(0)
    return revflow.ReversibleSequence(blocks, **options).double()


class Held:
    """Tensors that somebody holds, and what they were."""

    def __init__(self):
        self.tensors, self.before = [], []

    def take(self, tensors):
        self.tensors += tensors
        self.before += [t.detach().clone() for t in tensors]

    def assert_unchanged(self, count=1):
        assert len(self.tensors) >= count
        assert_equal(self.tensors, self.before)


def gradients(net, output, *inputs, **options):
    loss = sum(map(weighted, output)) if isinstance(output, tuple) else weighted(output)
    return torch.autograd.grad(loss, [*inputs, *net.parameters()], **options)


def streams(*shape, count=2, grad=True):
    return tuple(image(*(shape or (2, 4, 6, 4)), seed=k).requires_grad_(grad) for k in range(count))
