"""Shared by the examples: scikit-learn's digits, in gray and in color, training on them, and pictures.

The data are 1,797 handwritten digits of 8 x 8 pixels with values from 0 to 16 (`sklearn.datasets.load_digits`, from the UCI
repository). The package contains them: nothing is downloaded.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

LEVELS = 17
CLASSES = 10


class Labeled(NamedTuple):
    images: Tensor
    """(N, 8, 8), whole numbers from 0 to 16, or (N, 3, 32, 32), about 0 to 1; float32."""
    labels: Tensor
    """(N,), int64, 0 to 9."""

    def batch(self, size: int) -> Labeled:
        """So many of them, drawn at random."""
        chosen = torch.randint(len(self.labels), (size,))
        return Labeled(self.images[chosen], self.labels[chosen])


def digits() -> tuple[Labeled, Labeled]:
    """1,437 digits for training and 360 held out, of each class the same share."""
    data = load_digits()
    images, labels = torch.from_numpy(data.images).float(), torch.from_numpy(data.target).long()
    training, held_out = train_test_split(range(len(labels)), test_size=360, random_state=0, stratify=labels)
    return Labeled(images[training], labels[training]), Labeled(images[held_out], labels[held_out])


def colored(gray: Labeled) -> Labeled:
    """Digits in the shape of CIFAR's images: enlarged, in a random bright color on a random dark ground, with noise."""
    count = len(gray.images)
    ink = nn.functional.interpolate(gray.images[:, None] / (LEVELS - 1), scale_factor=4, mode="bilinear")
    ground, color = torch.rand(2, count, 3, 1, 1) / 2
    color = color + 0.5
    return Labeled(ground + (color - ground) * ink + 0.1 * torch.randn(count, 3, 32, 32), gray.labels)


def train(net: nn.Module, training: Labeled, steps: int, batch: int = 64, learning_rate: float = 5e-3) -> list[float]:
    """Train a classifier of colored digits, in new colors at each step; returns the losses."""
    optimizer = torch.optim.AdamW(net.parameters(), learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    losses = []
    for _ in range(steps):
        images, labels = colored(training.batch(batch))
        loss = nn.functional.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def accuracy(net: nn.Module, held_out: Labeled) -> float:
    """The share of images whose class `net`, in eval mode, finds."""
    net.eval()
    found = torch.cat([net(images).argmax(1) for images in held_out.images.split(100)])
    return (found == held_out.labels).float().mean().item()


def options(description: str | None, steps: int) -> argparse.Namespace:
    """An example's options, `--steps` and the picture `--out`; makes the random numbers those of the last run."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=steps, help="training steps (%(default)s)")
    parser.add_argument("--out", type=Path, help="write the picture to this PNG file")
    a = parser.parse_args()
    if a.steps < 1:
        parser.error(f"--steps must be at least 1, not {a.steps}")
    if a.out and (a.out.suffix != ".png" or not a.out.parent.is_dir()):
        parser.error(f"--out must be a .png file in an existing folder, not {a.out}")
    torch.manual_seed(0)
    return a


def draw(rows: dict[str, Tensor], path: Path) -> None:
    """Write a picture: for each name a row of images, (N, 3, H, W) in [0, 1] or (N, H, W) in gray."""
    columns = max(map(len, rows.values()))
    figure, axes = plt.subplots(len(rows), columns, figsize=(columns, 1.05 * len(rows)), squeeze=False)
    for (name, images), line in zip(rows.items(), axes, strict=True):
        line[0].set_ylabel(name)
        for image, axis in zip(images, line, strict=True):
            pixels = image.movedim(0, -1).clamp(0, 1) if image.dim() == 3 else image
            axis.imshow(pixels.numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=80, bbox_inches="tight")
    plt.close(figure)


class Curve(NamedTuple):
    """How one of two networks is drawn: in the colors of the benchmarks."""

    name: str
    color: str


STANDARD, REVERSIBLE = Curve("standard autograd", "#222222"), Curve("revflow", "#2a6fb8")


def draw_twins(
    curves: dict[str, Curve],
    losses: dict[str, list[float]],
    peaks: dict[str, list[int]],
    depths: dict[str, Sequence[int]],
) -> Figure:
    """Losses of two networks by the step, and peaks of a training step by the depth, which has one name."""
    ((unit, places),) = depths.items()
    figure = Figure((8.4, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for key, curve in curves.items():
        left.plot(losses[key], color=curve.color, linewidth=0.9)
        sizes = [peak / 2**20 for peak in peaks[key]]
        right.plot(places, sizes, "o-", color=curve.color, markersize=4)
        right.annotate(
            f"{curve.name}\n{sizes[-1]:.1f}", (places[-1], sizes[-1]), (6, 0), textcoords="offset points", va="center",
            color=curve.color, annotation_clip=False,
        )  # fmt: skip
    left.set(xlabel="step", ylabel="training loss", ylim=0)
    right.set(xlabel=unit, ylabel="peak of a training step, MiB", xticks=places, ylim=0)
    for axes in (left, right):
        axes.grid(color="#e4e4e4", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
