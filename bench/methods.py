"""Ways to train a reversible network: standard autograd, PyTorch's checkpointing, three other libraries, and revflow.

A method makes of a network (bench/networks.py) its passes, with the network's own parameters. Where a library is not
installed, or a network is not for a method, making it raises ImportError or `UnfitError`, which say so.

The libraries are optional. The extra `bench` has revtorch and revlib; memcnn asks for torchvision, and so for another PyTorch,
and needs neither:

    pip install --no-deps memcnn==1.5.2
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import revflow
from networks import Network, Streams, is_coupling

PEERS = ("memcnn", "revtorch", "revlib")


class UnfitError(Exception):
    """Why a method is not for a network."""


class Passes(NamedTuple):
    """What a method makes of a network."""

    forward: Callable[[Tensor], Tensor | Streams]
    inverse: Callable[[Tensor | Streams], Tensor | Streams] | None = None
    """Of what `forward` returned; None where the method has none."""


@dataclass(frozen=True)
class Method:
    """A name, a setting, and what makes the passes."""

    name: str
    setting: str
    of: Callable[[Network], Passes]
    may_fail: bool = False
    """Whether it needs what may be missing or broken here: another library, a compiler."""


def plain() -> Method:
    """Standard autograd."""
    return Method("plain", "", _plain)


def checkpointed(every: int | None) -> Method:
    """PyTorch's checkpointing of groups of so many couplings; None: as many as the root of their number, rounded."""
    return Method("checkpoint", f"every {every or 'sqrt(L)'}", partial(_checkpoint, every=every))


def selective() -> Method:
    """Checkpointing of every coupling that keeps what takes the time."""
    return Method("selective", "every 1", _selective)


def offloaded() -> Method:
    """Checkpointing of every coupling, whose inputs wait in the host's memory for the backward pass."""
    return Method("checkpoint", "every 1, offloaded", _offloaded)


def compiled() -> Method:
    """Checkpointing of every coupling, each compiled within its checkpoint."""
    return Method(
        "checkpoint", "every 1, compiled", partial(_checkpoint, every=1, run=torch.compile(_run)), may_fail=True
    )


def libraries() -> list[Method]:
    """The others that rebuild activations."""
    return [
        Method("memcnn", "per block", _memcnn, may_fail=True),
        Method("revtorch", "per stage", _revtorch, may_fail=True),
        Method("revlib", "per stage", _revlib, may_fail=True),
    ]


def reversible(setting: str, memory_budget: int | str = "none", **options: object) -> Method:
    """revflow, with a budget, of which bytes are for float32, and options of `revflow.ReversibleSequence`."""

    def of(network: Network) -> Passes:
        budget = memory_budget if isinstance(memory_budget, str) else memory_budget * network.leaf.element_size() // 4
        net = revflow.ReversibleSequence(network.blocks, network.split_dim, memory_budget=budget, **options)
        return Passes(lambda x: net(network.parted(x)), net.inverse)

    return Method("revflow", setting, of)


def planned(network: Network, memory_budget: int | str) -> revflow.Plan:
    """What revflow makes of a budget."""
    net = revflow.ReversibleSequence(network.blocks, network.split_dim, memory_budget=memory_budget)
    return net.plan(network.parted(network.leaf.detach()))


def _plain(network: Network) -> Passes:
    return Passes(lambda x: _run(network.blocks, *network.parted(x)))


def _run(blocks: list[nn.Module], *streams: Tensor) -> Streams:
    for block in blocks:
        streams = block(*streams)
    return streams


# What selective checkpointing keeps: the results of what takes the time.
KEPT = [
    torch.ops.aten.convolution.default,
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
]


def _selective(network: Network) -> Passes:
    return _checkpoint(network, 1, context_fn=partial(create_selective_checkpoint_contexts, KEPT))


def _offloaded(network: Network) -> Passes:
    if not network.leaf.is_cuda:
        raise UnfitError("it offloads to the host's memory, where a CPU's tensors are already")
    return _checkpoint(network, 1, boundaries=partial(torch.autograd.graph.save_on_cpu, pin_memory=True))


def _checkpoint(
    network: Network,
    every: int | None,
    run: Callable[..., Streams] = _run,
    boundaries: Callable[[], AbstractContextManager[object]] = nullcontext,
    **options: object,
) -> Passes:
    """Groups of couplings, each with the bijections before it; the last is computed again at once, and so not checkpointed."""
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
        with boundaries():  # of which the tensors are saved that a checkpoint begins with
            for group in checkpointed:
                # Nothing draws random numbers.
                streams = checkpoint(run, group, *streams, use_reentrant=False, preserve_rng_state=False, **options)
        return run(last, *streams)

    return Passes(forward)


def _memcnn(network: Network) -> Passes:
    """Every block by itself, also the bijections: an input's storage is emptied in the forward pass."""
    warnings.filterwarnings("ignore", "TypedStorage is deprecated|.torch.cuda.amp.custom_")  # in memcnn's own code
    import memcnn

    def wrapped(block: nn.Module) -> nn.Module:
        return _Emptied(memcnn.InvertibleModuleWrapper(block))

    def couplings(conditioners: list[nn.Module]) -> list[nn.Module]:
        # It runs a conditioner's `forward`, past hooks and torch.compile, which have their place in the call of a module.
        pairs = [map(nn.Sequential, pair) for pair in _pairs(conditioners)]
        return [wrapped(memcnn.AdditiveCoupling(f, g, split_dim=network.split_dim)) for f, g in pairs]

    chain = _joined(network, couplings, wrapped)
    return Passes(chain, lambda y: _undone(chain, y))


def _undone(chain: nn.Sequential, y: Tensor) -> Tensor:
    for part in reversed(chain):
        y = part.inverse(y)
    return y


class _Emptied(nn.Module):
    """Lets `revflow.measure_memory` see that memcnn has emptied a storage: it looks at those that operators return."""

    def __init__(self, wrapper: nn.Module) -> None:
        super().__init__()
        self.wrapper = wrapper

    def forward(self, x: Tensor) -> Tensor:
        y = self.wrapper(x)
        x.detach()
        return y

    def inverse(self, y: Tensor) -> Tensor:
        return self.wrapper.inverse(y)


def _revtorch(network: Network) -> Passes:
    """A sequence of each stage's couplings; shapes change in between, by standard autograd."""
    from revtorch import revtorch

    def couplings(conditioners: list[nn.Module]) -> list[nn.Module]:
        blocks = [revtorch.ReversibleBlock(f, g, network.split_dim) for f, g in _pairs(conditioners)]
        return [revtorch.ReversibleSequence(nn.ModuleList(blocks))]

    return Passes(_joined(network, couplings))


def _revlib(network: Network) -> Passes:
    """A sequence of each stage's couplings; shapes change in between, by standard autograd."""
    import revlib

    def couplings(conditioners: list[nn.Module]) -> list[nn.Module]:
        return [revlib.ReversibleSequential(*conditioners, split_dim=network.split_dim)]

    return Passes(_joined(network, couplings))


def _pairs(conditioners: list[nn.Module]) -> Iterator[tuple[nn.Module, nn.Module]]:
    """(F, G) of RevNet's block y1 = x1 + F(x2), y2 = x2 + G(y1), which is two of the network's."""
    if len(conditioners) % 2:
        raise UnfitError(f"its blocks take two conditioners, and {len(conditioners)} stand together")
    return zip(conditioners[::2], conditioners[1::2], strict=True)


def _joined(
    network: Network,
    couplings: Callable[[list[nn.Module]], list[nn.Module]],
    bijection: Callable[[nn.Module], nn.Module] = lambda block: block,
) -> nn.Sequential:
    """The network for a library whose modules take both streams as one tensor."""
    parts: list[nn.Module] = []
    for are_couplings, blocks in groupby(network.blocks, is_coupling):
        if are_couplings:
            parts += couplings([block.F for block in blocks])
        else:
            parts += [bijection(_OfBoth(b, 2 if parts else network.inputs, network.split_dim)) for b in blocks]
    return nn.Sequential(*parts)


class _OfBoth(nn.Module):
    """A bijection of streams, as one of the tensor that they are parts of."""

    def __init__(self, bijection: nn.Module, inputs: int, split_dim: int) -> None:
        super().__init__()
        self.bijection, self.inputs, self.split_dim = bijection, inputs, split_dim

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.bijection(*x.chunk(self.inputs, self.split_dim)), self.split_dim)

    def inverse(self, y: Tensor) -> Tensor:
        return torch.cat(self.bijection.inverse(*y.chunk(2, self.split_dim)), self.split_dim)
