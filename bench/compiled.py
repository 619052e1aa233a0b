"""Time of a training step with `compile_conditioners`, relative to the same step without.

    python bench/compiled.py

Needs a C++ compiler on the CPU. Steps alternate, and the figure is the median of the rounds' ratios.
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
    parser.add_argument("--blocks", type=int, default=8, help="number of blocks (8)")
    parser.add_argument("--rounds", type=int, default=20, help="number of timed pairs of steps (20)")
    parser.add_argument("--device", default="cpu", help="PyTorch device (cpu)")
    options = parser.parse_args()
    device = torch.device(options.device)
    print(f"torch {torch.__version__}, {options.blocks} blocks, {device}, {torch.get_num_threads()} threads")
    for name, make, shape in (("tokens", tokens, (4096, 128)), ("images", images, (4, 32, 64, 64))):
        torch.manual_seed(0)
        eager = revflow.ReversibleSequence([revflow.AdditiveCoupling(make()) for _ in range(options.blocks)]).to(device)
        compiled = copy.deepcopy(eager).compile_conditioners()
        x = torch.randn(shape, device=device)
        times = [[seconds(net, x) for net in (eager, compiled)] for _ in range(options.rounds + 3)][3:]
        ratio = statistics.median(b / a for a, b in times)
        print(f"{name}: compiled {ratio:.2f}× the eager step of {1e3 * statistics.median(a for a, _ in times):.0f} ms")


def tokens() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), GELU(), nn.Linear(64, 64), GELU())


def images() -> nn.Module:
    return nn.Sequential(
        nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 16, 1), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 16, 1)
    )


class GELU(nn.Module):
    """GPT-2's, written out: nine elementwise kernels, which a compiler fuses into one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x * (1.0 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3)))


def seconds(net: nn.Module, x: torch.Tensor) -> float:
    begin = time.perf_counter()
    net.zero_grad()
    net(x).square().mean().backward()
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
