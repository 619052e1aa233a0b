"""Keyword tensors, with chunks: one entry a sample is sliced, one entry for all is not."""

import pytest
import torch
from torch import nn

import revflow
from engine.nets import (
    Scale,
    assert_close,
    assert_same_gradients,
    image,
    mixed,
    plain_inverse,
    stacks,
    weighted,
)
from engine.slices import BATCH, batch, few_stacks, gradients_of, per_sample, sliced

CONTEXTS = {
    "one a sample": per_sample,
    "one for all": lambda: per_sample(size=1),
    "one number": lambda: image(1, seed=5)[0].detach().requires_grad_(),
}


@few_stacks
@pytest.mark.parametrize("kind", CONTEXTS)
@pytest.mark.parametrize("leaf", ["leaf", "not a leaf", "without gradient"])
def test_context(stack, kind, leaf):
    net, x, c = sliced(stack, 2), batch(), CONTEXTS[kind]()
    context = {"leaf": lambda: c, "not a leaf": lambda: c.sin(), "without gradient": lambda: c.detach()}[leaf]
    wanted = [x] if leaf == "without gradient" else [x, c]
    for size in (BATCH, 1):
        if size == 1 and kind == "one a sample":
            continue
        x = batch(size, 8, 6, 4)
        wanted[0] = x
        assert_same_gradients(
            net, lambda x=x: net(x, condition=context()), lambda x=x: net.plain(x, condition=context()), wanted
        )


@stacks
def test_context_of_the_inverse_and_of_log_determinants(stack):
    net, c = sliced(stack, 2), per_sample()
    y = net.plain(image(BATCH, 8, 6, 4), condition=c).detach().requires_grad_()
    assert_same_gradients(net, lambda: net.inverse(y, condition=c), lambda: plain_inverse(net, y, condition=c), [y, c])
    x, results = batch(), []
    for mode in (torch.enable_grad, revflow.ordinary_autograd):
        with mode():
            z, log_det = net.forward_with_log_det(x, condition=c)
        results.append([z, log_det, *torch.autograd.grad(weighted(z) + weighted(log_det), [x, c])])
    assert_close(*results)


@stacks
def test_the_context_alone_needs_a_gradient(stack):
    net, x, c = sliced(stack, 2).requires_grad_(False), image(BATCH, 8, 6, 4), per_sample()
    assert_same_gradients(net, lambda: net(x, condition=c), lambda: net.plain(x, condition=c), [c])


class Reading(nn.Module):
    """Has `conditioner` use what `read` finds in the keyword arguments."""

    def __init__(self, conditioner, read):
        super().__init__()
        self.conditioner, self.read = conditioner, read

    def forward(self, x, **context):
        return self.conditioner(x, condition=self.read(**context))


def test_trees_of_context():
    """Of tensors and other things; one a sample, one for all, and whole numbers."""
    a, b, number, labels = per_sample(5), per_sample(6, size=1), torch.tensor(2.0), torch.arange(BATCH)
    table = nn.Embedding(BATCH, 6).double()

    def read(tree, name, power):
        assert name == "sin" and isinstance(tree["list"], list) and tree["list"][2] is None
        label = table.weight.detach()[tree["more"]["labels"]][:, :, None, None]
        return tree["list"][0].sin() * tree["list"][1] ** power * tree["more"]["number"] + label

    net, x = sliced(mixed, 2), batch()
    for block in net:
        for name in ("F", "G"):
            if getattr(block, name, None) is not None:
                setattr(block, name, Reading(getattr(block, name), read))
    tree = {"list": [a, b, None], "more": {"number": number, "labels": labels}}
    context = {"tree": tree, "name": "sin", "power": 2}
    assert_same_gradients(net, lambda: net(x, **context), lambda: net.plain(x, **context), [x, a, b])
    assert tree["list"][0] is a and tree["more"]["labels"] is labels


def test_context_of_another_size_is_refused():
    for size in (2, BATCH + 1, 0):
        net = sliced(mixed)
        with pytest.raises(
            ValueError, match=rf"block 0 \(AdditiveCoupling\).*one entry per sample \(5\).*\({size}, 6, 1, 1\)"
        ):
            net(batch(), condition=per_sample(size=size))
    with torch.no_grad(), pytest.raises(RuntimeError, match="size"):
        sliced(mixed)(batch(), condition=per_sample(size=2))


def test_whole_blocks_see_whole_context():
    class Shift(Scale):
        def forward(self, *streams, by):
            assert len(by) == 3
            return tuple(s + by.sum() for s in streams)

        def inverse(self, *streams, by):
            return tuple(s - by.sum() for s in streams)

    net, x, by = revflow.ReversibleSequence([Shift()], chunks=2).double(), batch(), image(3).requires_grad_()
    results = [gradients_of(run(x, by=by), [x, by]) for run in (net, net.plain)]
    assert_close(*results)


class Mixed(nn.Module):
    """A matrix that is the same for all samples, and has as many rows as the batch has samples."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, BATCH)
        self.last = nn.Linear(4, 4)

    def forward(self, x, matrix):
        return self.last((self.first(x) @ matrix.expand(1, BATCH, 4)[0]).tanh())


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.last = nn.Linear(4, 4)

    def forward(self, x, matrix):
        return self.last(x * matrix.mean(0)).tanh()


def test_a_tensor_that_is_as_long_as_the_batch_by_coincidence_is_refused():
    net = revflow.ReversibleSequence([revflow.AdditiveCoupling(Pooled()) for _ in range(2)], chunks=2)
    x, matrix = torch.randn(BATCH, 8), torch.randn(BATCH, 4)
    with pytest.raises(ValueError, match=rf"block 0 .*keyword tensor of shape \({BATCH}, 4\).*tensor\[None\]"):
        net(x, matrix=matrix)


def test_the_remedy_for_a_tensor_that_is_as_long_as_the_batch():
    net = revflow.ReversibleSequence([revflow.AdditiveCoupling(Mixed()) for _ in range(2)], chunks=2).double()
    x = torch.randn(BATCH, 8, dtype=torch.float64, requires_grad=True)
    matrix = torch.randn(1, BATCH, 4, dtype=torch.float64, requires_grad=True)
    assert_same_gradients(net, lambda: net(x, matrix=matrix), lambda: net.plain(x, matrix=matrix), [x, matrix])
