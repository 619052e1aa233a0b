"""A reversible vision transformer, compared with the original: Rev-ViT (Mangalam et al. 2022,
https://arxiv.org/abs/2302.04869).

A vision transformer adds attention F and an MLP G in turn, x <- x + F(x), x <- x + G(x). `revflow.reversible` turns it into two
streams, y1 = x1 + F(x2), y2 = x2 + G(y1), whose activations the backward pass recomputes. Both start as the embedded patches,
and their mean is the head's input (the paper concatenates them instead).

Both twins start from the same parameters and see the same batches: handwritten digits of 8 x 8 pixels, in patches of 2 x 2
(scikit-learn's `load_digits`; nothing is downloaded). They compute different functions, so equally good training is observed
here, not guaranteed. The example prints accuracy on 360 held-out digits, and the peak memory of a training step.

    python examples/vit.py --out vit.png     # 40 seconds on one core
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import revflow
from digits import LEVELS, REVERSIBLE, STANDARD, Labeled, digits, draw_twins

Digits = tuple[Tensor, Tensor]
"""Images (N, 1, 8, 8) in [0, 1], labels (N)."""
Pairs = list[tuple[nn.Module, nn.Module]]
"""Attention and MLP of each layer."""
DEPTHS = (4, 8, 16, 32)
"""Layers for which memory is predicted."""


class Attention(nn.Module):
    """Self-attention of normalized tokens: (N, tokens, width) -> the same."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        mixed = functional.scaled_dot_product_attention(q, k, v)
        y: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return y


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class Residual(nn.Module):
    """The plain twin's layers: x <- x + F(x), x <- x + G(x)."""

    def __init__(self, pairs: Pairs) -> None:
        super().__init__()
        self.pairs = nn.ModuleList(nn.ModuleList(pair) for pair in pairs)

    def forward(self, x: Tensor) -> Tensor:
        for pair in self.pairs:
            for function in pair:
                x = x + function(x)
        return x


class VisionTransformer(nn.Module):
    """(N, 1, 8, 8) -> (N, 10): patches of 2 x 2 as 16 tokens, layers, and the mean token's class."""

    def __init__(self, layers: int, width: int, reversible: bool) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.positions = nn.Parameter(0.2 * torch.randn(16, width))
        pairs: Pairs = [(Attention(width), mlp(width)) for _ in range(layers)]
        self.layers = revflow.reversible(pairs) if reversible else Residual(pairs)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10))

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        logits: Tensor = self.head(self.layers(tokens).mean(1))
        return logits


def twins(layers: int, width: int) -> dict[str, VisionTransformer]:
    """With the same parameters."""
    found = {}
    for name in ("plain", "reversible"):
        torch.manual_seed(0)
        found[name] = VisionTransformer(layers, width, name == "reversible")
    return found


def with_channel(gray: Labeled) -> Digits:
    return gray.images[:, None] / (LEVELS - 1), gray.labels


def train(net: nn.Module, data: Digits, steps: int, batch: int) -> list[float]:
    """Adam with a warm-up and a cosine; returns the loss of each step."""
    images, labels = data
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps, pct_start=0.1)
    order = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(steps):
        chosen = torch.randint(len(labels), (batch,), generator=order)
        loss = functional.cross_entropy(net(images[chosen]), labels[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def accuracy(net: nn.Module, data: Digits) -> float:
    images, labels = data
    return (net(images).argmax(1) == labels).float().mean().item()


def peak(layers: int, width: int, batch: int, reversible: bool) -> int:
    """Bytes of a forward and a backward pass, parameters' gradients included: predicted, nothing is allocated."""

    def step() -> None:
        net = VisionTransformer(layers, width, reversible)
        parameters.append(sum(p.nbytes for p in net.parameters()))
        net(torch.randn(batch, 1, 8, 8)).square().sum().backward()

    parameters: list[int] = []
    return revflow.measure_memory(step, predict=True).peak - parameters[0]


def draw(losses: dict[str, list[float]], peaks: dict[str, list[int]], path: Path) -> None:
    curves = {"plain": STANDARD, "reversible": REVERSIBLE}
    draw_twins(curves, losses, peaks, {"layers": DEPTHS}).savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out", type=Path, help="PNG file for the losses, and for memory by the number of layers")
    options = parser.parse_args(arguments)
    training, held_out = map(with_channel, digits())
    losses, peaks = {}, {}
    for name, net in twins(options.layers, options.width).items():
        losses[name] = train(net, training, options.steps, options.batch)
        its_peak = peak(options.layers, options.width, options.batch, name == "reversible")
        print(f"{name:<10}  accuracy {accuracy(net, held_out):.1%}  peak of a training step {its_peak / 2**20:.1f} MiB")
        if options.out:
            peaks[name] = [peak(n, options.width, options.batch, name == "reversible") for n in DEPTHS]
    if options.out:
        draw(losses, peaks, options.out)


if __name__ == "__main__":
    main()
