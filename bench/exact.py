"""What exact arithmetic costs: a training step with exact=True over the same step without, in time and in memory kept.

    OMP_NUM_THREADS=1 python bench/exact.py --channels 64 --size 32 --blocks 12 --rounds 40

Chains of additive and of gated blocks with conditioners conv3x3, GroupNorm, SiLU, conv3x3, on the CPU, in one thread
(`bench/paired.py`); the guard at its default in both. Memory is what the forward pass leaves alive beyond the output.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import revflow
from paired import compare, conditioner, options


def main() -> None:
    a = options(__doc__)
    x = torch.randn(a.batch, 2 * a.channels, a.size, a.size)
    for make in (additive, gated):
        inexact = revflow.ReversibleSequence([make(a.channels) for _ in range(a.blocks)])
        exact = revflow.ReversibleSequence(copy.deepcopy(list(inexact)), exact=True)
        kept, kept_exactly = (bytes_a_value(net, x) / a.blocks for net in (inexact, exact))
        print(f"{make.__name__}: {compare(inexact, exact, x, a.rounds)} in time;", end=" ")
        print(f"kept a block and value of a stream: {kept:.3f} bytes, exact {kept_exactly:.3f}")


def bytes_a_value(net: nn.Module, x: Tensor) -> float:
    """What the forward pass leaves alive beyond its output, over the number of values of one stream."""
    return (revflow.measure_memory(lambda: net(x)).kept - x.nbytes) / (x.numel() / 2)


def additive(channels: int) -> nn.Module:
    return revflow.AdditiveCoupling(conditioner(channels))


def gated(channels: int) -> nn.Module:
    return revflow.GatedCoupling(nn.Sequential(conditioner(channels, 2), Halves()))


class Halves(nn.Module):
    """Parts the channels in two tensors."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.chunk(2, 1)


if __name__ == "__main__":
    main()
