"""What `compile_conditioners` gains: a training step with compiled conditioners against the same one without.

    python bench/compiled.py

Needs a C++ compiler on the CPU. Steps alternate; the figure is the median of the ratios within a round.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
from torch import nn

import revflow


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=64, help="of a stream")
    parser.add_argument("--size", type=int, default=32, help="height and width of the image")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(0)
    blocks = [revflow.AdditiveCoupling(conditioner(options.channels)) for _ in range(options.blocks)]
    eager = revflow.ReversibleSequence(blocks).to(device)
    compiled = copy.deepcopy(eager).compile_conditioners()
    x = torch.randn(4, 2 * options.channels, options.size, options.size, device=device)
    times = [[seconds(net, x) for net in (eager, compiled)] for _ in range(options.rounds + 3)][3:]
    ratio = statistics.median(b / a for a, b in times)
    print(
        f"torch {torch.__version__}, {options.blocks} blocks of {options.channels} channels at {options.size}, {device}"
    )
    print(f"compiled: {ratio:.2f} times the eager step ({1e3 * statistics.median(a for a, _ in times):.0f} ms)")


def conditioner(channels: int) -> nn.Module:
    """Elementwise work between convolutions: what a compiler fuses."""
    return nn.Sequential(
        nn.GroupNorm(8, channels), nn.GELU(), nn.Conv2d(channels, channels, 3, padding=1),
        nn.GroupNorm(8, channels), nn.GELU(), nn.Dropout(0.1), nn.Conv2d(channels, channels, 1),
    )  # fmt: skip


def seconds(net: nn.Module, x: torch.Tensor) -> float:
    begin = time.perf_counter()
    net.zero_grad()
    net(x).square().mean().backward()
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
