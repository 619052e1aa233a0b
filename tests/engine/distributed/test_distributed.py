"""Two processes, under DDP and under FSDP2: the guard, and the other directions of a sequence."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

from torch.distributed.fsdp import register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

import revflow
from engine.nets import Conditioner, network
from engine.spread import STACKS, batch_of, loss_of, model_of, shard, train


class Counting(Conditioner):
    """Gives another result each time."""

    def forward(self, x):
        return super().forward(x) * (self.calls + 1)


def fault_is_reported(rank, spread):
    model = model_of("additive")
    model.net[1].F = Counting(4).double()
    parallel = {"ddp": DistributedDataParallel, "fsdp": lambda m: shard(m, "blocks")}[spread](model)
    with pytest.raises(revflow.ReconstructionError, match="block 1 "):
        loss_of(parallel(batch_of(0)[1][rank])).backward()


@pytest.mark.parametrize("spread", ["ddp", "fsdp"])
def test_guard_reports_a_fault(ranks, spread):
    ranks.run(fault_is_reported, spread)


class Inverse(nn.Module):
    """A module whose forward is a sequence's inverse."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, y):
        return self.net.inverse(y)

    def plain(self, y):
        streams = y.chunk(2, 1)
        for block in reversed(list(self.net)):
            streams = block.inverse(*streams)
        return torch.cat(streams, 1)


class Flow(nn.Module):
    """The negative log-likelihood of affine couplings with two conditioners, a sample and dimension."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.likelihood(*self.net.forward_with_log_det(x))

    def plain(self, x):
        x1, x2 = x.chunk(2, 1)
        log_det = 0
        for block in self.net:
            log_scale, shift = block.F(x2)
            x1, log_det = x1 * log_scale.exp() + shift, log_det + log_scale.sum((1, 2, 3))
            log_scale, shift = block.G(x1)
            x2, log_det = x2 * log_scale.exp() + shift, log_det + log_scale.sum((1, 2, 3))
        return self.likelihood(torch.cat((x1, x2), 1), log_det)

    def likelihood(self, y, log_det):
        return (y.square().sum((1, 2, 3)) / 2 - log_det) / y[0].numel()


def other_directions(rank, wrapper, spread):
    net = network(STACKS["affine_two"])
    oracle = wrapper(copy.deepcopy(net))
    model = wrapper(net)
    if spread == "ddp":
        model = DistributedDataParallel(model)
    else:
        shard(model, spread, reshard_after_forward=True)
        for block in net:
            register_fsdp_forward_method(block, "inverse")
    train(rank, model, oracle)


@pytest.mark.parametrize("wrapper", [Inverse, Flow])
@pytest.mark.parametrize("spread", ["ddp", "root", "blocks"])
def test_inverse_and_log_determinant_inside_a_spread_model(ranks, wrapper, spread):
    """FSDP2 gathers a block's parameters for `inverse` once it is told to, as for any method but forward."""
    ranks.run(other_directions, wrapper, spread)
