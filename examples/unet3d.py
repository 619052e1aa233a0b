"""A reversible 3D U-Net within a memory cap that standard autograd exceeds (Brügger et al. 2019, arXiv 1906.06148).

Volumes make 3D networks run out of memory. In the partially reversible U-Net, the convolutions of each resolution are a
sequence of couplings y1 = x1 + F(x2), y2 = x2 + G(y1), on the way down and on the way up. Only the output of each sequence is
stored. A strided convolution leads to the next resolution, a transposed one back, and skip connections are added. (iUNets,
Etmann et al. 2020, arXiv 2005.05220, make these invertible too.)

The plain twin is the same network under `revflow.ordinary_autograd`, with the same gradients. `revflow.predict_memory` predicts
the number of volumes that fit into the cap, with parameters, gradients and Adam. With that batch, the network learns to find
solid and hollow ellipsoids of the same brightness, in noise. **The volumes are synthetic**, generated on demand. The example
prints the peaks, the batches, and the Dice score 2 |A ∩ B| / (|A| + |B|) of each shape on held-out volumes.

    python examples/unet3d.py --out unet3d.png     # 80 seconds on one core
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn import functional

import revflow

CLASSES = ("background", "solid", "hollow")


def convolution(channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv3d(channels, channels, 3, padding=1), nn.GroupNorm(1, channels), nn.SiLU())


def stage(channels: int, blocks: int) -> revflow.ReversibleSequence:
    half = channels // 2
    return revflow.ReversibleSequence(
        [revflow.AdditiveCoupling(convolution(half), convolution(half)) for _ in range(blocks)]
    )


class UNet3D(nn.Module):
    """(N, 1, D, H, W) -> logits (N, 3, D, H, W)."""

    def __init__(self, channels: Sequence[int] = (16, 32, 64), blocks: int = 3) -> None:
        super().__init__()
        resolutions = [*pairwise(channels)]
        self.stem = nn.Conv3d(1, channels[0], 1)
        self.encoders = nn.ModuleList(stage(c, blocks) for c in channels)
        self.downs = nn.ModuleList(nn.Conv3d(fine, coarse, 2, stride=2) for fine, coarse in resolutions)
        self.ups = nn.ModuleList(nn.ConvTranspose3d(coarse, fine, 2, stride=2) for fine, coarse in resolutions)
        self.decoders = nn.ModuleList(stage(c, blocks) for c in channels[:-1])
        self.head = nn.Conv3d(channels[0], len(CLASSES), 1)

    def forward(self, volumes: Tensor) -> Tensor:
        x = self.encoders[0](self.stem(volumes))
        skipped = []
        for down, encoder in zip(self.downs, self.encoders[1:], strict=True):
            skipped.append(x)
            x = encoder(down(x))
        for up, decoder in zip(reversed(self.ups), reversed(self.decoders), strict=True):
            x = decoder(up(x) + skipped.pop())
        logits: Tensor = self.head(x)
        return logits


def shapes(count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Volumes (count, 1, size, size, size) and classes (count, size, size, size): two solid and two hollow ellipsoids."""
    axes = torch.stack(torch.meshgrid(*[torch.arange(float(size))] * 3, indexing="ij"))
    classes = torch.zeros(count, size, size, size, dtype=torch.long)
    for volume in classes:
        for shape in (1, 2, 1, 2):
            center = size * (0.15 + 0.7 * torch.rand(3, 1, 1, 1, generator=generator))
            radius = size * (0.12 + 0.12 * torch.rand(3, 1, 1, 1, generator=generator))
            distance = ((axes - center) / radius).square().sum(0).sqrt()
            volume[distance < 1] = shape
            volume[distance < 0.6 * (shape == 2)] = 0
    noise = torch.randn(classes.shape, generator=generator)
    return (classes.gt(0) + 0.5 * noise)[:, None], classes


def training_step(net: nn.Module, optimizer: torch.optim.Optimizer, volumes: Tensor, classes: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = functional.cross_entropy(net(volumes), classes)
    loss.backward()
    optimizer.step()
    return loss.detach()


def adam(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(net.parameters(), lr=3e-3, fused=True)


def predicted(size: int, plain: bool) -> revflow.BatchMemory:
    """Of a training step, and all that it needs, by the batch: nothing is allocated."""

    def step(batch: int) -> None:
        net = UNet3D()
        volumes, classes = torch.randn(batch, 1, size, size, size), torch.zeros(batch, size, size, size).long()
        with revflow.ordinary_autograd() if plain else nullcontext():
            training_step(net, adam(net), volumes, classes)

    return revflow.predict_memory(step)


@torch.no_grad()
def dice(net: nn.Module, volumes: Tensor, classes: Tensor) -> list[float]:
    """Of solid and of hollow ellipsoids."""
    found = net(volumes).argmax(1)
    scores = []
    for shape in (1, 2):
        a, b = found == shape, classes == shape
        scores.append(2 * (a & b).sum().item() / (a.sum() + b.sum()).item())
    return scores


@torch.no_grad()
def draw(net: nn.Module, volumes: Tensor, classes: Tensor, path: Path) -> None:
    """The middle slices of four volumes, the truth, and what the network finds."""
    figure, axes = plt.subplots(3, 4, figsize=(6, 4.7), layout="constrained")
    rows = {"volume": volumes[:4, 0], "truth": classes[:4], "found": net(volumes[:4]).argmax(1)}
    for (name, images), line in zip(rows.items(), axes, strict=True):
        line[0].set_ylabel(name)
        for image, axis in zip(images, line, strict=True):
            axis.imshow(image[len(image) // 2].numpy(), cmap="gray" if name == "volume" else "viridis")
            axis.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--size", type=int, default=32, help="voxels along each side, a multiple of 4")
    parser.add_argument("--cap", type=int, default=48, help="MiB that a training step may take")
    parser.add_argument("--out", type=Path, help="PNG file for slices of the segmentation")
    options = parser.parse_args(arguments)
    cap = options.cap * 2**20
    memory = {"plain": predicted(options.size, True), "reversible": predicted(options.size, False)}
    batches = {name: found.largest_batch(cap) for name, found in memory.items()}
    batch = batches["reversible"]
    print(f"volumes of {options.size}³, synthetic; a training step may take {options.cap} MiB")
    for name, found in memory.items():
        print(f"{name:<10}  {batches[name]} volumes fit; a batch of {batch} takes {found.peak(batch) / 2**20:.1f} MiB")
    if not batch:
        raise SystemExit("not even one volume fits: raise --cap or lower --size")

    torch.manual_seed(0)
    net = UNet3D()
    optimizer, generator = adam(net), torch.Generator().manual_seed(1)
    held_out = shapes(8, options.size, torch.Generator().manual_seed(0))
    for step in range(options.steps):
        loss = training_step(net, optimizer, *shapes(batch, options.size, generator))
        if (step + 1) % 20 == 0:
            print(f"step {step + 1}  loss {loss.item():.3f}")
    solid, hollow = dice(net, *held_out)
    print(f"Dice on held-out volumes: solid {solid:.3f}, hollow {hollow:.3f}")
    if options.out:
        draw(net, *held_out, options.out)


if __name__ == "__main__":
    main()
