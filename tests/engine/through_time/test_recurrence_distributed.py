"""A recurrence on two processes, under DDP and FSDP2: the gradients of ordinary autograd over the whole batch."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

import revflow
from engine.budgets import limited
from engine.cells import given, loss_of, plainly, recurrence
from engine.nets import assert_close

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

few_modes = pytest.mark.parametrize("states", ["kept", "offloaded", 3])


class Model(nn.Module):
    """A recurrence over a batch of one or two samples."""

    def __init__(self, states, budget="min"):
        super().__init__()
        self.net = recurrence(states=states, memory_budget=budget)

    def forward(self, samples):
        return loss_of(self.net(*parts(samples)))


def parts(samples):
    """The inputs and the state of these samples of a batch of two."""
    inputs, state = given(steps=5)

    def of(tensors):
        return tuple(t.detach()[samples] for t in tensors)

    return [of(pair) for pair in inputs], revflow.RecurrentState(*(tuple(map(of, part)) for part in state))


def expected_gradients(model):
    """Of the mean of the ranks' losses, which are sums with weights of their own."""
    losses = [loss_of(plainly(model.net, *parts(slice(rank, rank + 1)))) for rank in range(2)]
    return torch.autograd.grad(sum(losses) / 2, list(model.parameters()))


def whole(gradient):
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def trains(rank, states, spread, options):
    model = Model(states)
    expected = expected_gradients(copy.deepcopy(model))
    parallel = DistributedDataParallel(model, **options) if spread == "ddp" else fully_shard(model)
    for _ in range(2):
        parallel.zero_grad()
        parallel(slice(rank, rank + 1)).backward()
        assert_close([whole(p.grad) for p in model.parameters()], expected)


@few_modes
@pytest.mark.parametrize(
    "options", [{}, {"find_unused_parameters": True}, {"static_graph": True}, {"bucket_cap_mb": 1e-6}], ids=str
)
def test_ddp(ranks, states, options):
    ranks.run(trains, states, "ddp", options)


def trains_with_a_budget(rank, spread, budget):
    """Some steps are stored, the others recomputed."""
    model = Model("kept", budget)
    expected = expected_gradients(copy.deepcopy(model))
    parallel = DistributedDataParallel(model) if spread == "ddp" else fully_shard(model)
    for _ in range(3):
        parallel.zero_grad()
        for cell in model.net:
            cell.calls[:] = [0, 0]
        parallel(slice(rank, rank + 1)).backward()
        assert_close([whole(p.grad) for p in model.parameters()], expected)
    counts = {cell.calls[0] for cell in model.net}
    assert len(counts) == 1 and 5 < min(counts) < 10
    assert model.net._keeper.in_use == 0


@pytest.mark.parametrize("spread", ["ddp", "fsdp"])
def test_some_steps_stored(ranks, spread):
    model, plans = Model("kept", budget := revflow.Budget(2**40)), []
    model(slice(0, 1)).backward()
    for limit in (0, 2**40):
        limited(budget, limit)
        plans.append(budget.plan.peak)
    ranks.run(trains_with_a_budget, spread, sum(plans) // 2)


@few_modes
def test_fsdp_on_the_root(ranks, states):
    ranks.run(trains, states, "fsdp", {})


def sharded_cells_are_refused(rank):
    model = Model("kept")
    for cell in model.net:
        fully_shard(cell)
    fully_shard(model)
    with pytest.raises(RuntimeError, match=r"fully_shard was called on a .*Cell that the engine runs by itself"):
        model(slice(rank, rank + 1))


def test_fsdp_on_cells_is_refused(ranks):
    ranks.run(sharded_cells_are_refused)
