"""Two processes: gradients under DDP and FSDP2 against ordinary autograd over the whole batch in one process.

Each case is a function that both ranks run; its test chooses the stack and the options, by name. The guard is on, at its
default, and its warnings are errors.
"""

import contextlib
import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

import revflow
from engine.nets import Conditioner, additive, affine_two, gated_two, image, mixed, network, of_one, relative_error
from engine.ranks import WORLD

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

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


def add_unused_parameters(model):
    model.spare = nn.Linear(2, 2).double()
    for block in (model.net[0], model.net[-1]):
        block.F.spare = nn.Parameter(torch.zeros(2).double())


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
