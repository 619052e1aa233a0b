"""What the tests of chunks share."""

import pytest
import torch
from torch import nn

import revflow
from engine.nets import (
    additive_two,
    gated,
    image,
    mixed,
    network,
    of_one,
    weighted,
)

BATCH = 5
FEW = [of_one(additive_two), of_one(gated), mixed]
few_stacks = pytest.mark.parametrize("stack", FEW, ids=lambda s: s.__name__)
sizes = pytest.mark.parametrize("batch", [5, 1])


def sliced(stack, chunks=2, **options):
    net = network(stack, **options)
    net.chunks = chunks
    return net


def batch(*shape, seed=1):
    return image(*(shape or (BATCH, 8, 6, 4)), seed=seed).requires_grad_()


def one_block(conditioner, chunks=2, kind=revflow.AdditiveCoupling, **options):
    return revflow.ReversibleSequence([kind(conditioner)], chunks=chunks, **options).double()


class InSlices(nn.Module):
    """A conditioner that runs in slices by itself: what ordinary autograd is to be compared with."""

    def __init__(self, conditioner, chunks):
        super().__init__()
        self.conditioner, self.chunks = conditioner, chunks

    def forward(self, x, **context):
        parts = []
        for rows in x.split(-(-len(x) // self.chunks)):
            begin = sum(len(p[0]) for p in parts)
            cut = {
                k: c[begin : begin + len(rows)] if c is not None and len(c) == len(x) else c for k, c in context.items()
            }
            part = self.conditioner(rows, **cut)
            parts.append(part if isinstance(part, tuple) else (part,))
        whole = tuple(torch.cat(p) for p in zip(*parts, strict=True))
        return whole if len(whole) > 1 else whole[0]


def in_slices(net):
    """The chain of `net`, of its very modules, each conditioner of which runs in slices by itself."""
    blocks = []
    for block in net:
        if isinstance(block, revflow.Coupling):
            block = type(block)(*[InSlices(c, net.chunks) for c in (block.F, block.G) if c is not None])
        blocks.append(block)
    return revflow.ReversibleSequence(blocks).train(net.training)


def snapshot(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def values(state):
    return [value.double() for value in state.values()]


def gradients_of(y, wanted):
    return [y, *torch.autograd.grad(weighted(y), wanted, allow_unused=True)]


def per_sample(seed=5, size=BATCH):
    return image(size, 6, 1, 1, seed=seed).requires_grad_()


class Norms(nn.Module):
    """(x) -> one tensor, through a norm between two convolutions."""

    def __init__(self, norm):
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(4, 4, 3, padding=1), norm, nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.last(nn.functional.silu(self.norm(self.first(x))))
