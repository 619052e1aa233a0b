"""Time of a training step with guard="warn", relative to the same step with guard="off".

    OMP_NUM_THREADS=1 python bench/guard.py --channels 64 --size 32 --blocks 12 --rounds 40

Additive blocks with conditioners conv3x3, GroupNorm, SiLU, conv3x3, on the CPU, in one thread (`bench/kit/paired.py`).
"""

from __future__ import annotations

import copy

import torch

import revflow
from kit.couplings import conditioner
from kit.paired import compare, options


def main() -> None:
    a = options(__doc__)
    blocks = [revflow.AdditiveCoupling(conditioner(a.channels)) for _ in range(a.blocks)]
    off = revflow.ReversibleSequence(blocks, guard="off")
    warn = revflow.ReversibleSequence(copy.deepcopy(blocks), guard="warn")
    x = torch.randn(a.batch, 2 * a.channels, a.size, a.size)
    print(f"with the guard: {compare(off, warn, x, a.rounds)}")


if __name__ == "__main__":
    main()
