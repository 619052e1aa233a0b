"""What exact arithmetic costs: a training step with exact=True over the same step without, in time and in memory kept.

    OMP_NUM_THREADS=1 python bench/exact.py --channels 64 --size 32 --blocks 12 --rounds 40

Chains of additive and of gated blocks with conditioners conv3x3, GroupNorm, SiLU, conv3x3, on the CPU, in one thread; the
guard at its default in both. Both steps run once a round, in random order; the figure is the median over the rounds of the
two times' ratio. Times are the process's own (what other processes use does not count). Memory is what the forward pass
leaves alive beyond the output.
"""

from __future__ import annotations

import argparse
import copy
import platform
import random
import statistics
import time

import torch
from torch import Tensor, nn

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
    print(f"{a.blocks} blocks, streams of {a.batch} x {a.channels} x {a.size} x {a.size}, float32, {a.rounds} rounds")
    print(f"{platform.machine()}, 1 thread, Python {platform.python_version()}, torch {torch.__version__}")
    x = torch.randn(a.batch, 2 * a.channels, a.size, a.size)
    for make in (additive, gated):
        torch.manual_seed(0)
        inexact = revflow.ReversibleSequence([make(a.channels) for _ in range(a.blocks)])
        exact = revflow.ReversibleSequence(copy.deepcopy(list(inexact)), exact=True)
        ratios = compare(inexact, exact, x, a.rounds)
        low, middle, high = (100 * (q - 1) for q in statistics.quantiles(ratios, n=4))
        error = 125.33 * statistics.stdev(ratios) / len(ratios) ** 0.5  # of a median of values that scatter normally
        print(f"{make.__name__}: {middle:+.1f} % +- {error:.1f} (quartiles {low:+.1f}, {high:+.1f}) in time;", end=" ")
        kept, kept_exactly = (bytes_a_value(net, x) / a.blocks for net in (inexact, exact))
        print(f"kept a block and value of a stream: {kept:.3f} bytes, exact {kept_exactly:.3f}")


def compare(inexact: nn.Module, exact: nn.Module, x: Tensor, rounds: int) -> list[float]:
    """The ratios of all rounds."""
    for net in (inexact, exact) * 2:
        timed(net, x)
    order = random.Random(0)
    ratios = []
    for _ in range(rounds):
        times = {name: timed(net, x) for name, net in order.sample([("inexact", inexact), ("exact", exact)], 2)}
        ratios.append(times["exact"] / times["inexact"])
    return ratios


def timed(net: nn.Module, x: Tensor) -> float:
    net.zero_grad(set_to_none=True)
    began = time.process_time()
    net(x).square().mean().backward()
    return time.process_time() - began


def bytes_a_value(net: nn.Module, x: Tensor) -> float:
    """What the forward pass leaves alive beyond its output, over the number of values of one stream."""
    return (revflow.measure_memory(lambda: net(x)).kept - x.nbytes) / (x.numel() / 2)


def additive(channels: int) -> nn.Module:
    return revflow.AdditiveCoupling(conditioner(channels))


def gated(channels: int) -> nn.Module:
    return revflow.GatedCoupling(Pair(conditioner(channels, 2)))


class Pair(nn.Module):
    """Parts the channels that `inner` returns in two."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.inner(x).chunk(2, 1)  # type: ignore[no-any-return]


def conditioner(channels: int, outputs: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.GroupNorm(8, channels),
        nn.SiLU(),
        nn.Conv2d(channels, outputs * channels, 3, padding=1),
    )


if __name__ == "__main__":
    main()
