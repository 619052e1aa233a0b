"""The engine's own time on conditioners that cost next to nothing: 32 tiny MLPs of width 8, against standard autograd.

    python bench/overhead.py

One training step is zero_grad, forward and backward. Steps of the three kinds alternate, and the figure is the median of the
rounds' ratios. Times are the process's own, of one thread. The expected ratio is at least 4/3: the engine runs every
conditioner twice.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import revflow


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=8, help="width of a stream and of a hidden layer, features (8)")
    parser.add_argument("--blocks", type=int, default=32, help="number of blocks (32)")
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[32, 256, 1024], help="batch sizes, samples (32 256 1024)"
    )
    parser.add_argument("--rounds", type=int, default=200, help="number of timed steps of each kind (200)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {options.blocks} blocks of width {options.width}")
    for rows in options.rows:
        off, on = ratios(options.width, options.blocks, rows, options.rounds)
        print(f"batch {rows:5d}: {off:.2f}× standard autograd with the guard off, {on:.2f}× with its default")


def ratios(width: int, blocks: int, rows: int, rounds: int) -> tuple[float, float]:
    """Median time of a step, relative to standard autograd's: with the guard off, and with its default."""
    torch.manual_seed(0)
    mlps = [nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)) for _ in range(blocks)]
    off = revflow.ReversibleSequence([revflow.AdditiveCoupling(mlp) for mlp in mlps], guard="off")
    on = revflow.ReversibleSequence(list(off))
    x = torch.randn(rows, 2 * width)

    def seconds(run: Callable[[Tensor], Tensor]) -> float:
        begin = time.process_time()
        off.zero_grad()
        run(x).square().mean().backward()
        return time.process_time() - begin

    times = [[seconds(run) for run in (off.plain, off, on)] for _ in range(rounds + 10)][10:]
    without, guarded = (statistics.median(row[k] / row[0] for row in times) for k in (1, 2))
    return without, guarded


if __name__ == "__main__":
    main()
