"""memory_budget on two processes: the step that measures, and those that keep some blocks, against plain on one."""

import copy

import pytest
import torch.distributed as dist

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import revflow
from engine.nets import evaluations, image
from engine.ranks import WORLD
from engine.spread import DDP_OPTIONS, batch_of, model_of, stacks, train

STEPS = 3


def with_budget(stack, share):
    """A model, and its twin under ordinary autograd; in the first of three steps the model measures."""
    model = model_of(stack)
    x = image(2, 8, 6, 4)
    net = model.net
    plans = {}
    for net.memory_budget in ("min", "max"):
        plans[net.memory_budget] = net.plan(x).peak
    oracle = copy.deepcopy(model)
    net.memory_budget = int(plans["min"] + share * max(0, plans["max"] - plans["min"]))
    return model, oracle


def assert_scheduled(model, parallel, rank, share):
    """Each of the conditioners ran once where it was kept; nothing is held."""
    counts = evaluations(model.net, lambda: parallel(batch_of(0)[1][rank]).square().mean().backward())
    counts = [n for block in counts for n in block]
    assert set(counts) <= {1, 2}
    assert 1 in counts
    assert share == 1 or 2 in counts
    assert model.net._keeper.in_use == len(model.net._keeper._pending) == 0


def ddp_trains(rank, stack, options, share):
    model, oracle = with_budget(stack, share)
    parallel = DistributedDataParallel(model, **DDP_OPTIONS[options])
    train(rank, parallel, oracle, STEPS)
    assert_scheduled(model, parallel, rank, share)


@stacks
@pytest.mark.parametrize("options", ["default", "static", "buckets"])
@pytest.mark.parametrize("share", [0.5, 1])
def test_ddp(ranks, stack, options, share):
    ranks.run(ddp_trains, stack, options, share)


def fsdp_trains(rank, stack, reshard, share):
    model, oracle = with_budget(stack, share)
    mesh = init_device_mesh("cpu", (WORLD,))
    for block in model.net:
        if isinstance(block, revflow.Coupling):
            fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
    train(rank, model, oracle, STEPS)
    assert_scheduled(model, model, rank, share)


@stacks
@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("share", [0.5, 1])
def test_fsdp(ranks, stack, reshard, share):
    ranks.run(fsdp_trains, stack, reshard, share)
