"""Two processes under FSDP2: gradients against ordinary autograd over the whole batch in one process."""

import copy

import pytest
import torch
import torch.distributed as dist

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from engine.nets import network, relative_error
from engine.ranks import WORLD
from engine.spread import (
    STACKS,
    Plain,
    add_dropout_and_batchnorm,
    add_unused_parameters,
    assert_same_gradients,
    batch_of,
    loss_of,
    model_of,
    shard,
    share_conditioners,
    stacks,
    train,
    train_as_plain,
)

layouts = pytest.mark.parametrize("layout", ["root", "sequence", "blocks"])


def fsdp_trains(rank, stack, layout, reshard):
    model = model_of(stack)
    oracle = copy.deepcopy(model)
    train(rank, shard(model, layout, reshard_after_forward=reshard), oracle)
    y = model(batch_of(0)[1][rank])
    assert isinstance(model.net[0].F.first.weight, DTensor) == reshard, "the parameters are not where they should be"
    y.sum().backward()


@stacks
@layouts
@pytest.mark.parametrize("reshard", [True, False])
def test_fsdp(ranks, stack, layout, reshard):
    ranks.run(fsdp_trains, stack, layout, reshard)


def fsdp_trains_a_sequence_alone(rank, stack, layout):
    net = network(STACKS[stack])
    oracle = copy.deepcopy(net)
    train(rank, shard(net, layout, reshard_after_forward=True), oracle)


@stacks
@pytest.mark.parametrize("layout", ["root", "blocks"])
def test_fsdp_on_a_sequence_alone(ranks, stack, layout):
    ranks.run(fsdp_trains_a_sequence_alone, stack, layout)


def fsdp_trains_with_frozen_and_unused(rank, stack, layout):
    model = model_of(stack)
    add_unused_parameters(model)
    model.head.requires_grad_(False)
    model.net[0].requires_grad_(False)
    model.net[-1].F.last.requires_grad_(False)
    oracle = copy.deepcopy(model)
    train(rank, shard(model, layout, reshard_after_forward=True), oracle)


@stacks
@layouts
def test_fsdp_with_frozen_blocks_and_unused_parameters(ranks, stack, layout):
    ranks.run(fsdp_trains_with_frozen_and_unused, stack, layout)


def fsdp_accumulates(rank, stack, layout):
    model = model_of(stack)
    oracle = copy.deepcopy(model)
    shard(model, layout, reshard_after_forward=True)
    for step in range(3):
        batch, own = batch_of(step)
        model.set_requires_gradient_sync(step == 2)
        loss_of(model(own[rank])).backward()
        loss_of(oracle.plain(batch)).backward()
    assert_same_gradients(model, oracle)


@stacks
@layouts
def test_fsdp_accumulates(ranks, stack, layout):
    ranks.run(fsdp_accumulates, stack, layout)


def fsdp_trains_shared_weights(rank, layout):
    model = model_of("additive")
    share_conditioners(model)
    oracle = copy.deepcopy(model)
    train(rank, shard(model, layout, reshard_after_forward=True), oracle)


@pytest.mark.parametrize("layout", ["root", "sequence"])
def test_fsdp_with_shared_weights(ranks, layout):
    """FSDP2 itself refuses weights that two sharded blocks share."""
    ranks.run(fsdp_trains_shared_weights, layout)


def fsdp_draws_and_counts_as_plain(rank, stack):
    model = model_of(stack)
    add_dropout_and_batchnorm(model)
    plain = shard(Plain(copy.deepcopy(model)), "blocks")
    train_as_plain(rank, shard(model, "blocks"), plain)


@stacks
def test_fsdp_with_dropout_and_batchnorm(ranks, stack):
    ranks.run(fsdp_draws_and_counts_as_plain, stack)


def sharded_inside_is_refused(rank, layout, reshard, message):
    """Refused where it would go wrong, in training. Without gradients the parameters are gathered as they are used."""
    model = model_of("mixed")
    _, own = batch_of(0)
    expected = model.plain(own[rank])
    shard(model, layout, reshard_after_forward=reshard)
    with torch.no_grad():
        error = relative_error(model(own[rank]), expected)
        assert error < 1e-10, f"the output without gradients has a relative error of {error:.1e}"
    with pytest.raises(RuntimeError, match=message):
        model(own[rank])


@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("conditioners", r"block 0 .*fully_shard was called on a FSDPConditioner.*Call fully_shard on the sequence"),
        ("whole block", r"block 4 .*fully_shard was called on a FSDPScale.*Call fully_shard on the sequence"),
    ],
)
def test_fsdp_on_what_the_engine_runs_by_itself_is_refused(ranks, layout, message, reshard):
    ranks.run(sharded_inside_is_refused, layout, reshard, message)


def cast_streams_are_refused(rank):
    model, mesh = model_of("additive"), init_device_mesh("cpu", (WORLD,))
    for block in model.net:
        fully_shard(block, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.float32))
    with pytest.raises(RuntimeError, match=r"block 0 .*pre-hook replaced its input"):
        fully_shard(model, mesh=mesh)(batch_of(0)[1][rank])


def test_fsdp_that_casts_the_streams_of_a_block_is_refused(ranks):
    ranks.run(cast_streams_are_refused)
