"""Training steps of two module stacks, timed in pairs: for bench/guard.py and bench/exact.py."""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import time

import torch
from torch import Tensor, nn


def options(description: str | None) -> argparse.Namespace:
    """The stack's size and the number of rounds. Sets one thread, and prints the sizes and the machine."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=64, help="channels per stream, a multiple of 8 (64)")
    parser.add_argument("--size", type=int, default=32, help="height and width of the streams, pixels (32)")
    parser.add_argument("--batch", type=int, default=1, help="batch size, samples (1)")
    parser.add_argument("--blocks", type=int, default=12, help="number of blocks (12)")
    parser.add_argument("--rounds", type=int, default=40, help="number of timed pairs of steps, at least 2 (40)")
    a = parser.parse_args()
    if min(a.size, a.batch, a.blocks) < 1 or a.rounds < 2 or a.channels < 8 or a.channels % 8:
        parser.error("sizes must be at least 1, --rounds 2, and --channels a multiple of 8")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{a.blocks} blocks, streams of {a.batch} x {a.channels} x {a.size} x {a.size}, float32, {a.rounds} rounds")
    print(f"{platform.machine()}, 1 thread, Python {platform.python_version()}, torch {torch.__version__}")
    return a


def compare(base: nn.Module, other: nn.Module, x: Tensor, rounds: int) -> str:
    """The additional time of a step of `other`: the median of the rounds' ratios, its standard error, and the quartiles.

    Both run once per round, in random order. Times are the process's own: other processes do not count.
    """
    for net in (base, other) * 2:
        _seconds(net, x)
    order = random.Random(0)
    ratios = []
    for _ in range(rounds):
        times = {name: _seconds(net, x) for name, net in order.sample([("base", base), ("other", other)], 2)}
        ratios.append(times["other"] / times["base"])
    low, middle, high = (100 * (q - 1) for q in statistics.quantiles(ratios, n=4))
    error = 125.33 * statistics.stdev(ratios) / rounds**0.5  # of a median of normally distributed values
    return f"{middle:+.2f} % +- {error:.2f} (quartiles {low:+.2f}, {high:+.2f})"


def _seconds(net: nn.Module, x: Tensor) -> float:
    net.zero_grad(set_to_none=True)
    began = time.process_time()
    net(x).square().mean().backward()
    return time.process_time() - began
