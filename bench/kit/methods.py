"""Ways to train a reversible network: standard autograd, PyTorch's checkpointing, three other libraries, and revflow.

A method turns a network (bench/kit/networks.py) into its passes, with the network's own parameters. If a library is missing,
this raises ImportError; if the method does not apply to the network, it raises `UnfitError`. The adapters of the libraries are
in bench/kit/libraries.py.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import revflow
from kit.networks import Network, Streams, is_coupling


class UnfitError(Exception):
    """The reason why a method does not apply to a network."""


class Passes(NamedTuple):
    """A network's passes by one method."""

    forward: Callable[[Tensor], Tensor | Streams]
    inverse: Callable[[Tensor | Streams], Tensor | Streams] | None = None
    """The input from the result of `forward`; None if the method has no inverse."""


@dataclass(frozen=True)
class Method:
    """A name, a setting, and the function that makes the passes."""

    name: str
    setting: str
    of: Callable[[Network], Passes]
    may_fail: bool = False
    """Whether it needs a library or a compiler that may be missing or broken here."""


def plain() -> Method:
    """Standard autograd."""
    return Method("plain", "", _plain)


def checkpointed(every: int | None) -> Method:
    """PyTorch's checkpointing of groups of that many couplings; None: the rounded square root of their number."""
    return Method("checkpoint", f"every {every or 'sqrt(L)'}", partial(_checkpoint, every=every))


def selective() -> Method:
    """Checkpointing of every coupling, which stores the results of its slow operators."""
    return Method("selective", "every 1", _selective)


def offloaded() -> Method:
    """Checkpointing of every coupling, with its inputs in the host's memory until the backward pass.

    Tensors of a CPU are there already, and stay where they are.
    """
    return Method("checkpoint", "every 1, offloaded", _offloaded)


def compiled() -> Method:
    """Checkpointing of every coupling, each compiled within its checkpoint."""
    return Method(
        "checkpoint", "every 1, compiled", partial(_checkpoint, every=1, run=torch.compile(_run)), may_fail=True
    )


def reversible(setting: str, memory_budget: int | str = "min", **options: Any) -> Method:
    """revflow, with a budget, of which bytes are for float32, and options of `revflow.ReversibleSequence`."""

    def of(network: Network) -> Passes:
        budget = memory_budget if isinstance(memory_budget, str) else memory_budget * network.leaf.element_size() // 4
        net = revflow.ReversibleSequence(network.blocks, network.split_dim, memory_budget=budget, **options)
        return Passes(lambda x: net(network.parted(x)), net.inverse)

    return Method("revflow", setting, of)


def planned(network: Network, memory_budget: int | str) -> revflow.Plan:
    """revflow's plan for a budget."""
    net = revflow.ReversibleSequence(network.blocks, network.split_dim, memory_budget=memory_budget)
    return net.plan(network.parted(network.leaf.detach()))


def _plain(network: Network) -> Passes:
    return Passes(lambda x: _run(network.blocks, *network.parted(x)))


def _run(blocks: list[nn.Module], *streams: Tensor) -> Streams:
    for block in blocks:
        streams = block(*streams)
    return streams


SLOW = {
    torch.ops.aten.convolution.default,
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
}
"""Operators whose results selective checkpointing stores, in addition to those of attention."""


def _policy(_: object, operator: object, *arguments: object, **options: object) -> CheckpointPolicy:
    is_slow = operator in SLOW or "scaled_dot_product" in str(operator)  # attention has an operator for each kernel
    return CheckpointPolicy.MUST_SAVE if is_slow else CheckpointPolicy.PREFER_RECOMPUTE


def _selective(network: Network) -> Passes:
    return _checkpoint(network, 1, context_fn=partial(create_selective_checkpoint_contexts, _policy))


def _offloaded(network: Network) -> Passes:
    return _checkpoint(
        network, 1, boundaries=partial(torch.autograd.graph.save_on_cpu, pin_memory=network.leaf.is_cuda)
    )


def _checkpoint(
    network: Network,
    every: int | None,
    run: Callable[..., Streams] = _run,
    boundaries: Callable[[], AbstractContextManager[object]] = nullcontext,
    **options: Any,
) -> Passes:
    """Groups of couplings, each with the bijections before it. The last is not checkpointed: its backward pass comes first."""
    every = every or round(len(network.conditioners) ** 0.5)
    groups: list[list[nn.Module]] = [[]]
    for block in network.blocks:
        if sum(map(is_coupling, groups[-1])) == every:
            groups.append([])
        groups[-1].append(block)
    *checkpointed, last = groups
    if not checkpointed:
        raise UnfitError("one group of blocks, which is standard autograd")

    def forward(x: Tensor) -> Streams:
        streams = network.parted(x)
        with boundaries():  # around the tensors that a checkpoint saves: its inputs
            for group in checkpointed:
                # No conditioner draws random numbers.
                streams = checkpoint(run, group, *streams, use_reentrant=False, preserve_rng_state=False, **options)
        return run(last, *streams)

    return Passes(forward)
