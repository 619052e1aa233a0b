"""Three other libraries that recompute activations, each as its documentation shows, as methods of bench/kit/methods.py.

All are optional. The extra `bench` installs revtorch and revlib. memcnn declares torchvision, which requires another PyTorch,
but uses neither:

    pip install --no-deps memcnn==1.5.2

To compare another library, write its function here, and add it to `libraries`, to `STYLES` in bench/pages/style.py, and to the
extra `bench` in setup.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from kit.methods import Method, Passes, UnfitError
from kit.networks import Network, Streams, conditioner_of, is_coupling


def libraries() -> list[Method]:
    return [
        Method("memcnn", "per block", _memcnn, may_fail=True),
        Method("revtorch", "per stage", _revtorch, may_fail=True),
        Method("revlib", "per stage", _revlib, may_fail=True),
    ]


def _memcnn(network: Network) -> Passes:
    """Every block by itself, also the bijections. The forward pass empties an input's storage."""
    warnings.filterwarnings("ignore", "TypedStorage is deprecated|.torch.cuda.amp.custom_")  # in memcnn's own code
    import memcnn

    def wrapped(block: nn.Module) -> nn.Module:
        return _Emptied(memcnn.InvertibleModuleWrapper(block))

    def couplings(conditioners: list[nn.Module]) -> list[nn.Module]:
        # memcnn calls a conditioner's `forward`, past hooks and torch.compile, which act on the call of a module.
        pairs = [map(nn.Sequential, pair) for pair in _pairs(conditioners)]
        return [wrapped(memcnn.AdditiveCoupling(f, g, split_dim=network.split_dim)) for f, g in pairs]

    parts = _joined(network, couplings, wrapped)

    def inverse(y: Tensor | Streams) -> Tensor | Streams:
        for part in reversed(parts):
            y = inverse_of(part)(y)
        return y

    return Passes(parts, inverse)


class _Emptied(nn.Module):
    """Returns the emptied input to `revflow.measure_memory`, which checks the storages that operators return."""

    def __init__(self, wrapper: nn.Module) -> None:
        super().__init__()
        self.wrapper = wrapper

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.wrapper(x)
        x.detach()
        return y

    def inverse(self, y: Tensor) -> Tensor:
        x: Tensor = inverse_of(self.wrapper)(y)
        return x


def _revtorch(network: Network) -> Passes:
    """A sequence of each stage's couplings. Standard autograd changes shapes in between."""
    from revtorch import revtorch

    def couplings(conditioners: list[nn.Module]) -> list[nn.Module]:
        blocks = [revtorch.ReversibleBlock(f, g, network.split_dim) for f, g in _pairs(conditioners)]
        return [revtorch.ReversibleSequence(nn.ModuleList(blocks))]

    return Passes(_joined(network, couplings))


def _revlib(network: Network) -> Passes:
    """A sequence of each stage's couplings. Standard autograd changes shapes in between."""
    import revlib

    def couplings(conditioners: list[nn.Module]) -> list[nn.Module]:
        return [revlib.ReversibleSequential(*conditioners, split_dim=network.split_dim)]

    return Passes(_joined(network, couplings))


def _pairs(conditioners: list[nn.Module]) -> Iterator[tuple[nn.Module, nn.Module]]:
    """(F, G) of RevNet's block y1 = x1 + F(x2), y2 = x2 + G(y1), which is two of the network's."""
    if len(conditioners) % 2:
        raise UnfitError(f"its blocks take two conditioners, and this stage has {len(conditioners)}")
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
            parts += couplings([conditioner_of(block) for block in blocks])
        else:
            parts += [bijection(_OfBoth(b, 2 if parts else network.inputs, network.split_dim)) for b in blocks]
    return nn.Sequential(*parts)


class _OfBoth(nn.Module):
    """A bijection of streams, as a function of one tensor that holds them."""

    def __init__(self, bijection: nn.Module, inputs: int, split_dim: int) -> None:
        super().__init__()
        self.bijection, self.inputs, self.split_dim = bijection, inputs, split_dim

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.bijection(*x.chunk(self.inputs, self.split_dim)), self.split_dim)

    def inverse(self, y: Tensor) -> Tensor:
        return torch.cat(inverse_of(self.bijection)(*y.chunk(2, self.split_dim)), self.split_dim)


def inverse_of(module: Any) -> Callable[..., Any]:
    """A method that the type `nn.Module` does not have."""
    inverse: Callable[..., Any] = module.inverse
    return inverse


PEERS = tuple(method.name for method in libraries())
"""Their names, which are also those of the packages."""
