"""What the tests of DDP and FSDP2 share: a model, its parts spread over two processes, and ordinary autograd to compare with.

Each case is a function that both ranks run; its test chooses the stack and the options, by name. The guard is on, at its
default, and its warnings are errors.
"""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import revflow
from engine.nets import Conditioner, additive, affine_two, gated_two, image, mixed, network, of_one, relative_error
from engine.ranks import WORLD

STACKS = {
    "additive": of_one(additive),
    "affine_two": of_one(affine_two),
    "gated_two": of_one(gated_two),
    "mixed": mixed,
}
stacks = pytest.mark.parametrize("stack", ["additive", "gated_two", "mixed"])
DDP_OPTIONS = {
    "default": {},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
    "views": {"gradient_as_bucket_view": True},
    "buckets": {"bucket_cap_mb": 1e-6},  # each parameter in its own
}


class Model(nn.Module):
    """A sequence with layers before and after it."""

    def __init__(self, net):
        super().__init__()
        self.head = nn.Conv2d(8, 8, 1).double()
        self.net = net
        self.tail = nn.Linear(192, 3).double()

    def forward(self, x):
        return self.tail(self.net(self.head(x)).flatten(1))

    def plain(self, x):
        return self.tail(self.net.plain(self.head(x)).flatten(1))


class Plain(nn.Module):
    """A module whose forward is another's `plain`."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.plain(x)


def model_of(stack, **options):
    net = network(STACKS[stack], **options)
    return Model(net)


def batch_of(step):
    """A batch of that step, and what each rank gets of it."""
    batch = image(2 * WORLD, 8, 6, 4, seed=10 + step)
    return batch, batch.chunk(WORLD)


def loss_of(y):
    return y.square().mean()


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same(what, model, oracle, of):
    """Compare `of` each parameter or buffer with that of its twin. Both have one, or none."""
    known = 0
    for (name, found), expected in zip(model.items(), oracle.values(), strict=True):
        found, expected = of(found), of(expected)
        if (found is None) != (expected is None):
            without = "here" if found is None else "under plain autograd"
            raise AssertionError(f"{name} has no {what} {without}, but only there")
        if expected is not None:
            known += 1
            error = relative_error(full(found), full(expected))
            assert error < 1e-10, f"{name}: its {what} has a relative error of {error:.1e}"
    assert known, f"there is no {what}"


def assert_same_gradients(model, oracle):
    assert_same("gradient", dict(model.named_parameters()), dict(oracle.named_parameters()), lambda p: p.grad)


def assert_same_state(model, oracle):
    assert_same("value", model.state_dict(), oracle.state_dict(), lambda t: t.double())


def train(rank, model, oracle, steps=3):
    """Steps of SGD: `model` on this rank's part of each batch, `oracle` under plain autograd on all of it."""
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.02, momentum=0.5) for m in (model, oracle)]
    for step in range(steps):
        batch, own = batch_of(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(model(own[rank])).backward()
        loss_of(oracle.plain(batch)).backward()
        assert_same_gradients(model, oracle)
        for optimizer in optimizers:
            optimizer.step()
    assert_same_state(model, oracle)


def train_as_plain(rank, model, plain):
    """Steps of SGD of two models that are spread alike, from the same seed, another one on each rank."""
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.02) for m in (model, plain)]
    for step in range(3):
        for m, optimizer in zip((model, plain), optimizers, strict=True):
            torch.manual_seed(10 * step + rank)
            optimizer.zero_grad()
            loss_of(m(batch_of(step)[1][rank])).backward()
        assert_same_gradients(model, plain)
        for optimizer in optimizers:
            optimizer.step()
    assert_same_state(model, plain)


def add_dropout_and_batchnorm(model):
    for block in model.net:
        if isinstance(block, revflow.Coupling):
            block.F.first.bias, block.F.norm = None, nn.BatchNorm2d(6).double()  # which takes a bias out again
            block.F.dropout.p = 0.3


def share_conditioners(model):
    """One conditioner in two blocks, and another in one block twice."""
    first, second = Conditioner(4).double(), Conditioner(4).double()
    blocks = [revflow.AdditiveCoupling(first), revflow.AdditiveCoupling(second, second)]
    model.net = revflow.ReversibleSequence([*blocks, revflow.AdditiveCoupling(first), blocks[1]])


def add_unused_parameters(model):
    model.spare = nn.Linear(2, 2).double()
    for block in (model.net[0], model.net[-1]):
        block.F.spare = nn.Parameter(torch.zeros(2).double())


def shard(model, layout, **options):
    """`fully_shard` on the parts of the model that the layout names, and on the model. Returns the model.

    Blocks that the engine knows by forward and inverse alone are left to the model, if they have parameters.
    """
    net = next(m for m in model.modules() if isinstance(m, revflow.ReversibleSequence))
    parts = {
        "root": [],
        "sequence": [net],
        "blocks": [b for b in net if isinstance(b, revflow.Coupling) or not [*b.parameters()]],
        "conditioners": [net[0].F],
        "whole block": [b for b in net if isinstance(b, revflow.Bijection) and not isinstance(b, revflow.Coupling)],
    }
    mesh = init_device_mesh("cpu", (WORLD,))
    for part in [*parts[layout], model]:
        fully_shard(part, mesh=mesh, **options)
    return model
