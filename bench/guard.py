"""What the guard costs: a training step with guard="warn" over the same step with guard="off".

    OMP_NUM_THREADS=1 python bench/guard.py --channels 64 --size 32 --blocks 12 --rounds 40

A chain of additive blocks with conditioners conv3x3, GroupNorm, SiLU, conv3x3, on the CPU, in one thread (`bench/paired.py`).
"""

from __future__ import annotations

import copy

import torch

import revflow
from paired import compare, conditioner, options


def main() -> None:
    a = options(__doc__)
    blocks = [revflow.AdditiveCoupling(conditioner(a.channels)) for _ in range(a.blocks)]
    off = revflow.ReversibleSequence(blocks, guard="off")
    warn = revflow.ReversibleSequence(copy.deepcopy(blocks), guard="warn")
    x = torch.randn(a.batch, 2 * a.channels, a.size, a.size)
    print(f"with the guard: {compare(off, warn, x, a.rounds)}")


if __name__ == "__main__":
    main()
