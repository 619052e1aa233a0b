"""Two processes and a compiled network, under DDP and FSDP2: gradients against standard autograd in one process.

The reference has the whole batch. A sequence is in one graph, whose backward pass recomputes. If that is not possible, a
warning or an error states the reason.
"""

import contextlib
import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

from test_distributed import Flow, Inverse
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch.nn.parallel import DistributedDataParallel

from engine.nets import network
from engine.spread import (
    STACKS,
    Plain,
    add_unused_parameters,
    assert_same_gradients,
    batch_of,
    loss_of,
    model_of,
    shard,
    train,
    train_as_plain,
)

OUTSIDE = "a ReversibleSequence runs outside of this compiled graph"
BUCKETS = {
    "one": ({}, 2**20, [True]),
    "each parameter": ({"bucket_cap_mb": 1e-6}, 1, [False, True, False]),
    "sequence and head": ({}, 1, [True, False]),
}
"""DDP's options, the bytes of its first bucket, and which forward graphs contain the sequence.

DDP fills its buckets from the end of the network: the tail comes first. PyTorch starts a new graph at each bucket.
"""
buckets = pytest.mark.parametrize("buckets", ["one", "each parameter", "sequence and head"])
orders = pytest.mark.parametrize("order", ["DDP in graph", "graph in DDP"])


def small_model():
    model = model_of("additive", norm=False)
    model.net = model.net[:2]
    return model


@contextlib.contextmanager
def graphs_with_the_sequence(forward):
    """A backend, of whose forward graphs these contain the sequence. The backward graphs must recompute each group of blocks."""
    torch.compiler.reset()
    graphs = AotEagerAndRecordGraphs()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", OUTSIDE)
        yield graphs
    found = groups(graphs.fw_graphs)
    assert [count > 0 for count in found] == forward
    assert sum(groups(graphs.bw_graphs)) == sum(found)
    torch.compiler.reset()


def groups(graphs):
    """The number of calls of groups of blocks, by graph."""
    return [sum("invoke_subgraph" in str(node.target) for node in g.graph.nodes) for g in graphs]


@contextlib.contextmanager
def first_bucket(size):
    """DDP and PyTorch's compiler read this constant. Of other buckets, DDP's options limit the size."""
    default = dist._DEFAULT_FIRST_BUCKET_BYTES
    dist._DEFAULT_FIRST_BUCKET_BYTES = size
    try:
        yield
    finally:
        dist._DEFAULT_FIRST_BUCKET_BYTES = default


def compiled_ddp(model, order, backend, **options):
    """DDP itself cannot be traced, so it ends the graph, unless it is outside of the compiled network."""
    if order == "DDP in graph":
        return torch.compile(DistributedDataParallel(model, **options), backend=backend)
    return DistributedDataParallel(torch.compile(model, backend=backend, fullgraph=True), **options)


def ddp_trains(rank, order, buckets):
    options, first, forward = BUCKETS[buckets]
    model = small_model()
    oracle = copy.deepcopy(model)
    with first_bucket(first), graphs_with_the_sequence(forward) as backend:
        train(rank, compiled_ddp(model, order, backend, **options), oracle)


@orders
@buckets
def test_ddp(ranks, order, buckets):
    """A sequence is never split, even if it is larger than a bucket."""
    ranks.run(ddp_trains, order, buckets)


def ddp_trains_with_options(rank, options, add_unused):
    model = small_model()
    add_unused(model)
    oracle = copy.deepcopy(model)
    with graphs_with_the_sequence([True]) as backend:
        train(rank, compiled_ddp(model, "graph in DDP", backend, **options), oracle)


def add_unused_layer(model):
    model.spare = nn.Linear(2, 2).double()


@pytest.mark.parametrize("options", ["find_unused_parameters", "static_graph"])
def test_ddp_with_unused_parameters(ranks, options):
    ranks.run(ddp_trains_with_options, {options: True}, add_unused_layer)


def test_ddp_with_unused_parameters_in_conditioners(ranks):
    ranks.run(ddp_trains_with_options, {"find_unused_parameters": True}, add_unused_parameters)


def ddp_accumulates(rank):
    """Twice: two batches under no_sync and one outside."""
    options, first, forward = BUCKETS["sequence and head"]
    model = small_model()
    oracle = copy.deepcopy(model)
    with first_bucket(first), graphs_with_the_sequence(forward) as backend:
        parallel = DistributedDataParallel(model, **options)
        run = torch.compile(parallel, backend=backend)
        for begin in (0, 3):
            model.zero_grad()
            oracle.zero_grad()
            for step in range(begin, begin + 3):
                batch, own = batch_of(step)
                with contextlib.nullcontext() if step == begin + 2 else parallel.no_sync():
                    loss_of(run(own[rank])).backward()
                loss_of(oracle.plain(batch)).backward()
            assert_same_gradients(model, oracle)


def test_ddp_accumulates_under_no_sync(ranks):
    ranks.run(ddp_accumulates)


def ddp_moves_statistics(rank):
    options, first, forward = BUCKETS["sequence and head"]
    model = small_model()
    for block in model.net:
        block.F.first.bias, block.F.norm = None, nn.BatchNorm2d(6).double()
    plain = DistributedDataParallel(Plain(copy.deepcopy(model)))
    with first_bucket(first), graphs_with_the_sequence(forward) as backend:
        train_as_plain(rank, compiled_ddp(model, "DDP in graph", backend, **options), plain)


def test_ddp_with_batchnorm(ranks):
    ranks.run(ddp_moves_statistics)


def fsdp_trains(rank, layout, reshard):
    """If the sequence is a unit of its own, FSDP2's hooks end the graph before it and after it."""
    model = small_model()
    oracle = copy.deepcopy(model)
    with graphs_with_the_sequence([True] if layout == "root" else [False, True, False]) as backend:
        shard(model, layout, reshard_after_forward=reshard)
        train(rank, torch.compile(model, backend=backend, fullgraph=layout == "root"), oracle)


@pytest.mark.parametrize("layout", ["root", "sequence"])
@pytest.mark.parametrize("reshard", [True, False])
def test_fsdp(ranks, layout, reshard):
    ranks.run(fsdp_trains, layout, reshard)


def fsdp_trains_a_compiled_sequence(rank):
    model = small_model()
    oracle = copy.deepcopy(model)
    with graphs_with_the_sequence([True]) as backend:
        model.net.compile(backend=backend, fullgraph=True)
        train(rank, shard(model, "sequence", reshard_after_forward=True), oracle)


def test_fsdp_with_a_compiled_sequence(ranks):
    ranks.run(fsdp_trains_a_compiled_sequence)


def fsdp_accumulates(rank):
    model = small_model()
    oracle = copy.deepcopy(model)
    with graphs_with_the_sequence([False, True, False]) as backend:
        run = torch.compile(shard(model, "sequence", reshard_after_forward=True), backend=backend)
        for step in range(3):
            batch, own = batch_of(step)
            model.set_requires_gradient_sync(step == 2)
            loss_of(run(own[rank])).backward()
            loss_of(oracle.plain(batch)).backward()
        assert_same_gradients(model, oracle)


def test_fsdp_accumulates(ranks):
    ranks.run(fsdp_accumulates)


def sharded_blocks_run_outside(rank):
    torch.compiler.reset()
    reason = rf"{OUTSIDE}: block 0 \(FSDPAdditiveCoupling\): it has hooks"
    model, graphs = small_model(), AotEagerAndRecordGraphs()
    oracle = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=reason):
        train(rank, torch.compile(shard(model, "blocks"), backend=graphs), oracle)
    assert len(graphs.fw_graphs) == 3 and not any(groups(graphs.fw_graphs))
    torch.compiler.reset()
    with pytest.warns(UserWarning, match=reason), pytest.raises(RuntimeError, match=reason):
        torch.compile(model, backend=graphs, fullgraph=True)(batch_of(0)[1][rank])
    torch.compiler.reset()


def test_fsdp_on_blocks_leaves_the_sequence_to_the_engine(ranks):
    ranks.run(sharded_blocks_run_outside)


def sharded_inside_is_refused(rank, stack, layout, reason, message):
    model, x = model_of(stack), batch_of(0)[1][rank]
    shard(model, layout)
    for fullgraph, expected in ((True, reason), (False, message)):
        torch.compiler.reset()
        with pytest.warns(UserWarning, match=reason), pytest.raises(RuntimeError, match=expected):
            torch.compile(model, backend="aot_eager", fullgraph=fullgraph)(x)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("stack", "layout", "reason", "message"),
    [
        ("additive", "conditioners", "a FSDPConditioner has hooks", "fully_shard was called on a FSDPConditioner"),
        ("mixed", "whole block", "a FSDPPixelUnshuffle has hooks", "fully_shard was called on a FSDPScale"),
    ],
)
def test_fsdp_inside_blocks_is_refused(ranks, stack, layout, reason, message):
    ranks.run(sharded_inside_is_refused, stack, layout, reason, message)


def trains_by_inductor(rank, spread):
    torch.compiler.reset()
    model = small_model()
    oracle = copy.deepcopy(model)
    with warnings.catch_warnings(), first_bucket(1):
        warnings.filterwarnings("error", OUTSIDE)
        if spread == "ddp":
            train(rank, torch.compile(DistributedDataParallel(model)), oracle)
        else:
            train(rank, torch.compile(shard(model, "sequence", reshard_after_forward=True)), oracle)
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("spread", ["ddp", "fsdp"])
def test_by_inductor(ranks, spread):
    ranks.run(trains_by_inductor, spread)


def other_directions(rank, wrapper, spread):
    net = network(STACKS["affine_two"])[:2]
    oracle = wrapper(copy.deepcopy(net))
    with graphs_with_the_sequence([True]) as backend:
        model = torch.compile(wrapper(net), backend=backend, fullgraph=True)
        train(rank, DistributedDataParallel(model) if spread == "ddp" else shard(model, "root"), oracle)


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", [Inverse, Flow])
@pytest.mark.parametrize("spread", ["ddp", "fsdp"])
def test_inverse_and_log_determinant(ranks, wrapper, spread):
    ranks.run(other_directions, wrapper, spread)


def trains_mixed_blocks(rank, spread):
    model = model_of("mixed", norm=False)
    model.net = model.net[:5]
    oracle = copy.deepcopy(model)
    with (
        first_bucket(1),
        graphs_with_the_sequence([True, False] if spread == "ddp" else [False, True, False]) as backend,
    ):
        parallel = DistributedDataParallel(model) if spread == "ddp" else shard(model, "sequence")
        train(rank, torch.compile(parallel, backend=backend), oracle)


@pytest.mark.slow
@pytest.mark.parametrize("spread", ["ddp", "fsdp"])
def test_mixed_blocks(ranks, spread):
    ranks.run(trains_mixed_blocks, spread)
