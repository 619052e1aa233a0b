"""Reversible networks to measure: tiny blocks, convolutions, a transformer, and the encoder of CrevNet's autoencoder.

A network is a list of blocks that each method runs in its own way (bench/kit/methods.py), with the same parameters: couplings
(x1, x2) -> (x2, x1 + F(x2)) and bijections that change shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import revflow
from crevnet import CrevNetConfig
from crevnet.networks.crevnet.autoencoder import TwoWayAutoencoder
from kit.couplings import conditioner

Streams = tuple[Tensor, ...]


@dataclass(frozen=True)
class Network:
    """Blocks, and the input to train them on."""

    name: str
    size: str
    blocks: list[nn.Module]
    """`revflow.AdditiveCoupling` of one conditioner each, and bijections."""
    leaf: Tensor
    """A step's input is a copy of it, as if another layer had made it: only the network holds that copy."""
    split_dim: int = 1
    inputs: int = 2
    """Number of streams into which the input is split."""

    @property
    def conditioners(self) -> list[nn.Module]:
        return [conditioner_of(block) for block in self.blocks if is_coupling(block)]

    @property
    def parameters(self) -> list[Tensor]:
        """All tensors that get a gradient, the input first."""
        return [self.leaf, *(p for block in self.blocks for p in block.parameters())]

    def to(self, dtype: torch.dtype) -> Network:
        """Convert parameters and input to this precision. All gradients then exist and are zero."""
        for block in self.blocks:
            block.to(dtype)
        self.leaf.data = self.leaf.data.to(dtype)
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        return self

    def parted(self, x: Tensor) -> Streams:
        return x.chunk(self.inputs, self.split_dim)

    def joined(self, x: Tensor | Streams) -> Tensor:
        return x if isinstance(x, Tensor) else torch.cat(x, self.split_dim)

    def step(
        self, forward: Callable[[Tensor], Tensor | Streams], between: Callable[[], object] = lambda: None
    ) -> Tensor:
        """Run a forward and a backward pass, which adds to the gradients. Returns the loss."""
        y = forward(self.leaf.clone())
        streams = y if isinstance(y, tuple) else (y,)
        loss = torch.stack([s.square().sum() for s in streams]).sum() / self.leaf.numel()
        between()
        loss.backward()
        return loss.detach()


def is_coupling(block: nn.Module) -> bool:
    return isinstance(block, revflow.AdditiveCoupling)


def conditioner_of(coupling: nn.Module) -> nn.Module:
    (conditioner,) = coupling.children()
    return conditioner


def tiny(batch: int = 256, width: int = 8, blocks: int = 32, device: torch.device | str = "cpu") -> Network:
    """Conditioners that cost next to nothing (Linear, SiLU, Linear): each method's own work remains."""
    with torch.device(device):
        mlps = [nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)) for _ in range(blocks)]
        leaf = torch.randn(batch, 2 * width, requires_grad=True)
    return Network(
        "tiny", f"{blocks} blocks, {batch} x {width} per stream", list(map(revflow.AdditiveCoupling, mlps)), leaf
    )


def convolutions(batch: int = 4, size: int = 16, blocks: int = 32, device: torch.device | str = "cpu") -> Network:
    """Like i-RevNet: conv3x3, GroupNorm, SiLU, conv3x3 at 64 channels per stream."""
    with torch.device(device):
        couplings: list[nn.Module] = [revflow.AdditiveCoupling(conditioner(64)) for _ in range(blocks)]
        leaf = torch.randn(batch, 128, size, size, requires_grad=True)
    return Network("convolutions", f"{blocks} blocks, {batch} x 64 x {size} x {size} per stream", couplings, leaf)


def transformer(batch: int = 4, tokens: int = 128, layers: int = 12, device: torch.device | str = "cpu") -> Network:
    """Like Reformer: attention and an MLP alternate, at 128 features per stream."""
    features = 128
    with torch.device(device):
        couplings: list[nn.Module] = [
            revflow.AdditiveCoupling(f) for _ in range(layers) for f in (Attention(features, heads=4), mlp(features))
        ]
        leaf = torch.randn(batch, tokens, 2 * features, requires_grad=True)
    size = f"{layers} layers, {batch} x {tokens} x {features} per stream"
    return Network("transformer", size, couplings, leaf, split_dim=2)


def autoencoder(batch: int = 4, frame: int = 96, blocks: int = 4, device: torch.device | str = "cpu") -> Network:
    """CrevNet's encoder: three stages, each at a quarter of the pixels and four times the channels of the one before.

    The presets' fourth stage is left out: at sizes for a CPU its parameters would outweigh the activations.
    """
    config = CrevNetConfig(blocks=(blocks,) * 3, strides=(1, 2, 2))
    with torch.device(device):
        encoder = list(TwoWayAutoencoder(config).blocks)
        leaf = torch.rand(batch, config.input_channels, frame, frame, requires_grad=True)
    size = f"3 stages of {blocks} blocks, frames of {batch} x {config.input_channels} x {frame} x {frame}"
    return Network("autoencoder", size, encoder, leaf, inputs=1)


class Attention(nn.Module):
    """Pre-normalized multi-head self-attention."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(features)
        self.qkv = nn.Linear(features, 3 * features, bias=False)  # softmax cancels a key's bias
        self.out = nn.Linear(features, features)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x_BTD)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        y: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return y


def mlp(features: int) -> nn.Sequential:
    """Pre-normalized, four times as wide inside."""
    return nn.Sequential(
        nn.LayerNorm(features), nn.Linear(features, 4 * features), nn.GELU(), nn.Linear(4 * features, features)
    )
