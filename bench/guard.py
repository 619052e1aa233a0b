"""What the guard costs: a training step with guard="warn" over the same step with guard="off".

    OMP_NUM_THREADS=1 python bench/guard.py --channels 64 --size 32 --blocks 12 --rounds 40

A chain of additive blocks with conditioners conv3x3, GroupNorm, SiLU, conv3x3, on the CPU, in one thread. Both steps run
once a round, in random order; the figure is the median over the rounds of the two times' ratio. Times are the process's own
(what other processes use does not count).
"""

from __future__ import annotations

import argparse
import copy
import platform
import random
import statistics
import time

import torch
from torch import nn

import revflow


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=64, help="of each of the two streams")
    parser.add_argument("--size", type=int, default=32, help="height and width")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=40)
    a = parser.parse_args()
    torch.set_num_threads(1)
    ratios, seconds = measure(a.channels, a.size, a.batch, a.blocks, a.rounds)
    low, middle, high = statistics.quantiles(ratios, n=4)
    error = 1.2533 * statistics.stdev(ratios) / len(ratios) ** 0.5  # of a median of values that scatter normally
    print(f"{a.blocks} blocks, streams of {a.batch} x {a.channels} x {a.size} x {a.size}, float32, {a.rounds} rounds")
    print(f"{platform.machine()}, 1 thread, Python {platform.python_version()}, torch {torch.__version__}")
    print(f"step without the guard: {1000 * seconds:.1f} ms (median)")
    low, middle, high, error = 100 * (low - 1), 100 * (middle - 1), 100 * (high - 1), 100 * error
    print(f"with the guard: {middle:+.2f} % +- {error:.2f} (quartiles {low:+.2f}, {high:+.2f})")


def measure(channels: int, size: int, batch: int, blocks: int, rounds: int) -> tuple[list[float], float]:
    """The ratios of all rounds, and the median time of a step without the guard."""
    torch.manual_seed(0)
    off = revflow.ReversibleSequence(
        [revflow.AdditiveCoupling(conditioner(channels)) for _ in range(blocks)], guard="off"
    )
    warn = revflow.ReversibleSequence(copy.deepcopy(list(off)), guard="warn")
    x = torch.randn(batch, 2 * channels, size, size)
    for net in (off, warn) * 2:
        timed(net, x)
    order = random.Random(0)
    times: dict[str, list[float]] = {"off": [], "warn": []}
    for _ in range(rounds):
        for name, net in order.sample([("off", off), ("warn", warn)], 2):
            times[name].append(timed(net, x))
    return [w / o for w, o in zip(times["warn"], times["off"], strict=True)], statistics.median(times["off"])


def timed(net: nn.Module, x: torch.Tensor) -> float:
    net.zero_grad(set_to_none=True)
    began = time.process_time()
    net(x).square().mean().backward()
    return time.process_time() - began


def conditioner(channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.GroupNorm(8, channels),
        nn.SiLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
    )


if __name__ == "__main__":
    main()
