"""Two processes under DDP: gradients against ordinary autograd over the whole batch in one process."""

import contextlib
import copy

import pytest
import torch.distributed as dist

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import revflow
from engine.nets import network
from engine.spread import (
    DDP_OPTIONS,
    STACKS,
    Plain,
    add_dropout_and_batchnorm,
    add_unused_parameters,
    assert_same_gradients,
    batch_of,
    loss_of,
    model_of,
    share_conditioners,
    stacks,
    train,
    train_as_plain,
)


def ddp_trains(rank, stack, options):
    model = model_of(stack)
    oracle = copy.deepcopy(model)
    train(rank, DistributedDataParallel(model, **DDP_OPTIONS[options]), oracle)


@stacks
@pytest.mark.parametrize("options", DDP_OPTIONS)
def test_ddp(ranks, stack, options):
    ranks.run(ddp_trains, stack, options)


def ddp_trains_a_sequence_alone(rank, stack):
    net = network(STACKS[stack])
    oracle = copy.deepcopy(net)
    train(rank, DistributedDataParallel(net), oracle)


@stacks
def test_ddp_around_a_sequence_alone(ranks, stack):
    ranks.run(ddp_trains_a_sequence_alone, stack)


def ddp_trains_with_unused_parameters(rank, stack, options):
    model = model_of(stack)
    add_unused_parameters(model)
    oracle = copy.deepcopy(model)
    train(rank, DistributedDataParallel(model, **DDP_OPTIONS[options]), oracle)


@stacks
@pytest.mark.parametrize("options", ["unused", "static"])
def test_ddp_leaves_unused_parameters_without_gradients(ranks, stack, options):
    ranks.run(ddp_trains_with_unused_parameters, stack, options)


def ddp_trains_with_frozen_blocks(rank, stack, late):
    """Blocks frozen before DDP looks at the model, or after it, when it takes them for unused."""
    model = model_of(stack)
    oracle = copy.deepcopy(model)
    if late:
        parallel = DistributedDataParallel(model, find_unused_parameters=True)
    for m in (model, oracle):
        m.head.requires_grad_(False)
        m.net[0].requires_grad_(False)
        m.net[-1].F.requires_grad_(False)
    if not late:
        parallel = DistributedDataParallel(model)
    train(rank, parallel, oracle)


@stacks
@pytest.mark.parametrize("late", [False, True])
def test_ddp_with_frozen_blocks(ranks, stack, late):
    ranks.run(ddp_trains_with_frozen_blocks, stack, late)


def ddp_accumulates(rank, stack, options):
    """Twice: two batches under no_sync and one outside. The second time must not remember the first."""
    model = model_of(stack)
    oracle = copy.deepcopy(model)
    parallel = DistributedDataParallel(model, **DDP_OPTIONS[options])
    for first in (0, 3):
        model.zero_grad()
        oracle.zero_grad()
        for step in range(first, first + 3):
            batch, own = batch_of(step)
            with contextlib.nullcontext() if step == first + 2 else parallel.no_sync():
                loss_of(parallel(own[rank])).backward()
            loss_of(oracle.plain(batch)).backward()
        assert_same_gradients(model, oracle)


@stacks
@pytest.mark.parametrize("options", ["default", "views"])
def test_ddp_accumulates_under_no_sync(ranks, stack, options):
    ranks.run(ddp_accumulates, stack, options)


def ddp_trains_shared_weights(rank, options):
    model = model_of("additive")
    share_conditioners(model)
    oracle = copy.deepcopy(model)
    train(rank, DistributedDataParallel(model, **DDP_OPTIONS[options]), oracle)


@pytest.mark.parametrize("options", DDP_OPTIONS)
def test_ddp_with_shared_weights(ranks, options):
    ranks.run(ddp_trains_shared_weights, options)


def ddp_draws_and_counts_as_plain(rank, stack):
    model = model_of(stack)
    add_dropout_and_batchnorm(model)
    plain = DistributedDataParallel(Plain(copy.deepcopy(model)))
    train_as_plain(rank, DistributedDataParallel(model), plain)


@stacks
def test_ddp_with_dropout_and_batchnorm(ranks, stack):
    ranks.run(ddp_draws_and_counts_as_plain, stack)


def launches(parallel, net, x):
    """How many buckets have been sent when the backward pass comes to each coupling, by its index in the sequence."""
    sent, found = [], {}

    def send(state, bucket):
        sent.append(bucket.index())
        return allreduce_hook(state, bucket)

    def arrive(index, here):
        if here:
            found.setdefault(index, len(sent))

    parallel.register_comm_hook(None, send)
    for index, block in enumerate(net):
        for conditioner in (getattr(block, "F", None), getattr(block, "G", None)):
            if conditioner is not None and isinstance(parallel.module, Plain):
                conditioner.register_full_backward_pre_hook(lambda *_, i=index: arrive(i, True))
            elif conditioner is not None:
                conditioner.register_forward_hook(lambda *_, i=index: arrive(i, revflow.is_recomputing()))
    for _ in range(2):  # DDP makes its buckets from what it has seen in the first
        sent.clear()
        found.clear()
        loss_of(parallel(x)).backward()
    return found


def ddp_sends_early(rank, stack):
    model = model_of(stack)
    x = batch_of(0)[1][rank]
    oracle = copy.deepcopy(model)
    plain = launches(DistributedDataParallel(Plain(oracle), **DDP_OPTIONS["buckets"]), oracle.net, x)
    found = launches(DistributedDataParallel(model, **DDP_OPTIONS["buckets"]), model.net, x)
    behind = len([*model.net[1:].parameters(), *model.tail.parameters()])
    assert plain[0] == behind, f"plain sends {plain[0]} of {behind} buckets before it comes to the first block"
    assert found == plain, f"buckets sent before each block: {found}, but {plain} under plain autograd"


@stacks
def test_ddp_sends_buckets_before_the_first_block_is_rewound(ranks, stack):
    ranks.run(ddp_sends_early, stack)
