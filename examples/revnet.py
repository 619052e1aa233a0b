"""RevNet: a residual network that does not store its activations (Gomez et al. 2017, arXiv:1707.04585).

A block splits the channels into two halves and alternately adds a residual function of one to the other (section 3.1):

    y1 = x1 + F(x2)        x2 = y2 - G(y1)
    y2 = x2 + G(y1)        x1 = y1 - F(x2)

The right side is its inverse, by which the backward pass recovers x1 and x2. As in the paper there are three stages of such
blocks. The layers between them change the image's size and store their input. The twin is the same network under standard
autograd, with the same initial weights and the same batches.

The images have the shape of CIFAR's, 3 x 32 x 32, but are not photographs. They are scikit-learn's digits, enlarged, each in a
random bright color on a random dark background, with noise. Nothing is downloaded.

    python examples/revnet.py --out revnet.png    # 93 seconds of one CPU core

It prints the accuracy of both on held-out digits, and the peak memory of a training step of both. It draws losses and memory.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import nn

import revflow
from digits import CLASSES, REVERSIBLE, STANDARD, Labeled, accuracy, colored, digits, draw_twins, options, train

WAYS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "RevNet": nullcontext,
    "its plain twin": revflow.ordinary_autograd,
}
BATCH = 64
DEPTHS = (1, 3, 6, 9)


class RevNet(nn.Sequential):
    """Images (N, 3, H, W) -> logits (N, classes); H and W are multiples of 4.

    Args:
        blocks: reversible blocks of each stage, of two residual functions of two convolutions.
        channels: of each stage, even numbers; the stages halve H and W.
    """

    def __init__(self, blocks: int = 3, channels: tuple[int, ...] = (16, 32, 64), classes: int = CLASSES) -> None:
        layers: list[nn.Module] = []
        for before, after in zip((3, *channels), channels, strict=False):
            layers.append(nn.Conv2d(before, after, 3, stride=1 if before == 3 else 2, padding=1))
            layers.append(revflow.ReversibleSequence([block(after // 2) for _ in range(blocks)]))
        head = (nn.BatchNorm2d(after), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(after, classes))
        super().__init__(*layers, *head)


def block(channels: int) -> revflow.AdditiveCoupling:
    return revflow.AdditiveCoupling(residual(channels), residual(channels))


def residual(channels: int) -> nn.Sequential:
    """Pre-activated, as in the paper."""
    return nn.Sequential(
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
    )


def peak(blocks: int, way: AbstractContextManager[None], batch: Labeled) -> int:
    """The most bytes at any time of a training step beyond weights and images, with the weights' gradients."""
    net = RevNet(blocks)

    def step() -> None:
        nn.functional.cross_entropy(net(batch.images), batch.labels).backward()

    with way:
        return revflow.measure_memory(step).peak


def show(losses: dict[str, list[float]], peaks: dict[str, list[int]], path: Path) -> None:
    curves = dict(zip(WAYS, (REVERSIBLE, STANDARD), strict=True))
    draw_twins(curves, losses, peaks, {"blocks per stage": DEPTHS}).savefig(path, dpi=120)


def main() -> None:
    a = options(__doc__, steps=200)
    training, held_out = digits()
    held_out, batch = colored(held_out), colored(training.batch(BATCH))
    losses, peaks = {}, {}
    for name, way in WAYS.items():
        torch.manual_seed(0)
        net = RevNet()
        with way():
            losses[name] = train(net, training, a.steps, BATCH)
        reached = accuracy(net, held_out)
        peaks[name] = [peak(blocks, way(), batch) for blocks in DEPTHS]
        print(
            f"{name:15s} {reached:6.1%} of {len(held_out.labels)} held-out digits right after {a.steps} steps; ", end=""
        )
        print("peak of a step", ", ".join(f"{p / 2**20:.0f}" for p in peaks[name]), f"MiB at {DEPTHS} blocks per stage")
    if a.out:
        show(losses, peaks, a.out)


if __name__ == "__main__":
    main()
