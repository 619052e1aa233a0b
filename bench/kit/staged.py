"""Residual networks with stages, built from transitions and residual branches, to run in four ways with the same parameters.

A transition changes the shape of its input: a strided block, a change of width, an upsampling layer. A branch F is the residual
part of a block x + F(x). The ways differ in the activations that they store:

- plain: standard autograd stores all of them.
- checkpoint: PyTorch's activation checkpointing of every transition and every block.
- reversible: the branches of a stage are couplings on two streams (`revflow.reversible`). Transitions store their activations.
- mixed: the same, with every transition checkpointed, and every stage of a single block, in which couplings save nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import revflow

Way = Literal["plain", "checkpoint", "reversible", "mixed"]
WAYS: tuple[Way, ...] = get_args(Way)


def part(module: nn.Module, way: Way) -> nn.Module:
    """A transition."""
    return Checkpointed(module) if way in ("checkpoint", "mixed") else module


def stage(branches: Sequence[nn.Module], way: Way) -> nn.Module:
    """The blocks of one shape."""
    if branches and (way == "reversible" or (way == "mixed" and len(branches) > 1)):
        return revflow.reversible(branches)
    blocks = [Residual(branch) for branch in branches]
    return nn.Sequential(*(blocks if way == "plain" else map(Checkpointed, blocks)))


class Residual(nn.Module):
    def __init__(self, branch: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.branch, self.shortcut = branch, nn.Identity() if shortcut is None else shortcut

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.shortcut(x) + self.branch(x)
        return y


class Checkpointed(nn.Module):
    """A module whose activations are recomputed in the backward pass. No module here draws random numbers."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.module, *inputs, use_reentrant=False, preserve_rng_state=False)
        return y


def resnet(depths: Sequence[int], way: Way, width: int = 64) -> nn.Module:
    """A ResNet of bottleneck blocks in pre-activation order (He et al. 2016b, https://arxiv.org/abs/1603.05027).

    With (3, 4, 6, 3) blocks it is ResNet-50, with (3, 8, 36, 3) ResNet-152. The first block of each stage is the transition.
    """
    stem = nn.Sequential(nn.Conv2d(3, width, 7, 2, 3, bias=False), _norm(width), nn.MaxPool2d(3, 2, 1))
    parts, channels = [part(stem, way)], width
    for k, depth in enumerate(depths):
        inner, outer, stride = width * 2**k, 4 * width * 2**k, 1 if k == 0 else 2
        shortcut = nn.Conv2d(channels, outer, 1, stride, bias=False)
        parts.append(part(Residual(_bottleneck(channels, inner, stride), shortcut), way))
        parts.append(stage([_bottleneck(outer, inner) for _ in range(depth - 1)], way))
        channels = outer
    head = nn.Sequential(_norm(channels), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000))
    return nn.Sequential(*parts, head)


def _norm(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


def _bottleneck(channels: int, inner: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        *(_norm(channels), nn.Conv2d(channels, inner, 1, bias=False)),
        *(_norm(inner), nn.Conv2d(inner, inner, 3, stride, 1, bias=False)),
        *(_norm(inner), nn.Conv2d(inner, 4 * inner, 1, bias=False)),
    )


class SegResNet(nn.Module):
    """A U-Net of residual blocks for volumes (Myronenko 2018, https://arxiv.org/abs/1810.11654), without its autoencoder branch.

    `depths` are the numbers of blocks on the way down, from the finest resolution. On the way up, each resolution has one block.
    """

    def __init__(self, depths: Sequence[int], way: Way, width: int = 16, channels: int = 4, classes: int = 3) -> None:
        super().__init__()
        widths = [width * 2**k for k in range(len(depths))]
        downs = [
            nn.Conv3d(channels, width, 3, padding=1, bias=False),
            *(nn.Conv3d(w // 2, w, 3, 2, 1, bias=False) for w in widths[1:]),
        ]
        self.downs = nn.ModuleList(part(down, way) for down in downs)
        self.encoders = nn.ModuleList(
            stage([_convolutions(w) for _ in range(depth)], way) for w, depth in zip(widths, depths, strict=True)
        )
        coarse_to_fine = widths[-2::-1]
        self.ups = nn.ModuleList(part(_Up(2 * w, w), way) for w in coarse_to_fine)
        self.decoders = nn.ModuleList(stage([_convolutions(w)], way) for w in coarse_to_fine)
        head = nn.Sequential(nn.GroupNorm(8, width), nn.ReLU(inplace=True), nn.Conv3d(width, classes, 1))
        self.head = part(head, way)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for down, encoder in zip(self.downs, self.encoders, strict=True):
            x = encoder(down(x))
            skips.append(x)
        skips.pop()
        for up, decoder in zip(self.ups, self.decoders, strict=True):
            x = decoder(up(x, skips.pop()))
        y: Tensor = self.head(x)
        return y


class _Up(nn.Module):
    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.project = nn.Conv3d(channels, outputs, 1, bias=False)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return skip + functional.interpolate(self.project(x), scale_factor=2.0, mode="trilinear")


def _convolutions(channels: int) -> nn.Sequential:
    def layer() -> list[nn.Module]:
        convolution = nn.Conv3d(channels, channels, 3, padding=1, bias=False)
        return [nn.GroupNorm(8, channels), nn.ReLU(inplace=True), convolution]

    return nn.Sequential(*layer(), *layer())


def llama(layers: int, width: int, way: Way) -> nn.Module:
    """The decoder layers of Llama (Touvron et al. 2023, https://arxiv.org/abs/2302.13971), without embedding and output layer.

    Attention and MLP are one branch each. A checkpoint contains both. There are no transitions.
    """
    pairs = [(CausalAttention(width, width // 128), GatedMLP(width)) for _ in range(layers)]
    if way in ("reversible", "mixed"):
        return revflow.reversible(pairs)
    blocks = [nn.Sequential(*map(Residual, pair)) for pair in pairs]
    return nn.Sequential(*(map(Checkpointed, blocks) if way == "checkpoint" else blocks))


class CausalAttention(nn.Module):
    """Causal self-attention with rotary embeddings of the positions, after RMSNorm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x_BTD)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(_rotated(q), _rotated(k), v, is_causal=True)
        y: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return y


def _rotated(x_BHTD: Tensor) -> Tensor:
    tokens, size = x_BHTD.shape[-2:]
    frequencies = 10_000.0 ** (-torch.arange(0, size, 2) / size)
    angles = torch.outer(torch.arange(tokens), frequencies)
    a, b = x_BHTD.chunk(2, -1)
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)


class GatedMLP(nn.Module):
    """W3 (silu(W1 x) * W2 x), after RMSNorm. The inner width is 8/3 of the outer one, rounded up to a multiple of 256."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = -(-8 * width // (3 * 256)) * 256
        self.norm = nn.RMSNorm(width)
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        y: Tensor = self.down(functional.silu(self.gate(x)) * self.up(x))
        return y
