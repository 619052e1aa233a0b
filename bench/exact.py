"""Time and stored memory of a training step with exact=True, relative to the same step without.

    OMP_NUM_THREADS=1 python bench/exact.py --channels 64 --size 32 --blocks 12 --rounds 40

Sequences of additive and of gated blocks with conditioners conv3x3, GroupNorm, SiLU, conv3x3, on the CPU, in one thread
(`bench/kit/paired.py`). The guard has its default in both. Memory is the forward pass's live tensors beyond the output.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import revflow
from kit.couplings import additive, gated
from kit.paired import compare, options


def main() -> None:
    a = options(__doc__)
    x = torch.randn(a.batch, 2 * a.channels, a.size, a.size)
    for make in (additive, gated):
        inexact = revflow.ReversibleSequence([make(a.channels) for _ in range(a.blocks)])
        exact = revflow.ReversibleSequence(copy.deepcopy(list(inexact)), exact=True)
        stored, stored_exactly = (bytes_per_value(net, x) / a.blocks for net in (inexact, exact))
        print(f"{make.__name__}: {compare(inexact, exact, x, a.rounds)} in time;", end=" ")
        print(f"stored per block and value of a stream: {stored:.3f} bytes, exact {stored_exactly:.3f}")


def bytes_per_value(net: nn.Module, x: Tensor) -> float:
    """Live memory of the forward pass beyond its output, over the number of values of one stream."""
    return (revflow.measure_memory(lambda: net(x)).kept - x.nbytes) / (x.numel() / 2)


if __name__ == "__main__":
    main()
