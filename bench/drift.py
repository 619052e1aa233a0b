"""Rounding errors of a reversible module stack against its depth: in floating point, and on a grid (exact=True).

    OMP_NUM_THREADS=1 python bench/drift.py --depths 10 30 100 300 1000 --out docs/images/drift.png

Additive blocks with conditioners conv3x3, GroupNorm, SiLU, conv3x3, untrained, on the CPU, in one thread, without the guard.
For each stack, two errors, each the largest over `--networks` networks:

- of the input that the backward pass recomputes. It is the largest difference from the input of the forward pass, over the
  largest value there, of the stream that the first block's conditioner gets;
- of the parameters' gradients: the L2 norm of their difference from those of `net.plain`, over the norm of these.

Both runs of a network use the same arithmetic. `net.plain` also runs under autocast, with its cache off (cached weights are
enough to change gradients), and on the grid if the stack does. Prints tables; `--out` draws both errors.
"""

from __future__ import annotations

import argparse
import csv
import platform
from collections.abc import Callable
from dataclasses import asdict
from typing import NamedTuple

import torch
from torch import Tensor, nn

import revflow
from kit.arithmetics import ARITHMETICS, Arithmetic, Row
from kit.networks import conditioner_of
from pages.drift_figure import TITLES, draw
from pages.report import output
from pages.style import save


class Errors(NamedTuple):
    """Relative errors."""

    rebuilt: float
    gradients: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--depths", type=int, nargs="+", default=[10, 30, 100, 300, 1000], help="numbers of blocks (10 30 100 300 1000)"
    )
    parser.add_argument("--channels", type=int, default=8, help="channels per stream (8)")
    parser.add_argument("--size", type=int, default=16, help="height and width, pixels (16)")
    parser.add_argument("--networks", type=int, default=3, help="number of networks; the largest error counts (3)")
    parser.add_argument("--csv", type=output(".csv"), help="CSV file to write the rows to")
    parser.add_argument("--out", type=output(".png", ".pdf", ".svg"), help="picture to draw, .png, .pdf or .svg")
    a = parser.parse_args()
    if min(*a.depths, a.channels, a.size, a.networks) < 1:
        parser.error("--depths, --channels, --size and --networks must be at least 1")
    torch.set_num_threads(1)
    print(f"{platform.machine()}, 1 thread, Python {platform.python_version()}, torch {torch.__version__}")
    print(f"streams of 1 x {a.channels} x {a.size} x {a.size}, largest of {a.networks} networks")
    rows = [
        Row(arithmetic.name, depth, *measure(arithmetic, depth, a.channels, a.size, a.networks))
        for arithmetic in ARITHMETICS
        for depth in a.depths
    ]
    for name in TITLES:
        print(f"\n{name}\n\n{table(name, rows)}")
    if a.csv is not None:
        with a.csv.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=[*asdict(rows[0])])
            writer.writeheader()
            writer.writerows(map(asdict, rows))
    if a.out is not None:
        save(draw(rows), a.out)


def measure(arithmetic: Arithmetic, depth: int, channels: int, size: int, networks: int) -> Errors:
    """The largest errors of that many networks, each with an input of its own."""
    errors = []
    for seed in range(networks):
        torch.manual_seed(seed)
        net = revflow.ReversibleSequence(
            [revflow.AdditiveCoupling(conditioner(channels)) for _ in range(depth)],
            guard="off",
            exact=arithmetic.exact,
        )
        errors.append(errors_of(net, torch.randn(1, 2 * channels, size, size), arithmetic.autocast))
    return Errors(*map(max, zip(*errors, strict=True)))


def errors_of(net: revflow.ReversibleSequence, x: Tensor, autocast: bool) -> Errors:
    seen: list[Tensor] = []
    recomputed: list[Tensor] = []

    def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        (recomputed if revflow.is_recomputing() else seen).append(inputs[0].detach().clone())

    hook = conditioner_of(net[0]).register_forward_pre_hook(look)
    found = gradients(net, net, x, autocast)
    hook.remove()
    plain = gradients(net, net.plain, x, autocast)
    (before,), (after,) = seen, recomputed
    return Errors(
        ((after - before).abs().max() / before.abs().max()).item(), ((found - plain).norm() / plain.norm()).item()
    )


def gradients(net: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor, autocast: bool) -> Tensor:
    """The gradients of all parameters, in one vector of float64."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
        y = run(x)
    found = torch.autograd.grad(y.square().mean(), list(net.parameters()))
    return torch.cat([g.flatten() for g in found]).double()


def conditioner(channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.GroupNorm(1, channels),
        nn.SiLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
    )


def table(name: str, rows: list[Row]) -> str:
    names = [arithmetic.name for arithmetic in ARITHMETICS]
    lines = [["blocks", *names], ["---"] * (1 + len(names))]
    for depth in dict.fromkeys(row.blocks for row in rows):
        errors = [getattr(row, name) for row in rows if row.blocks == depth]
        lines.append([str(depth), *("0" if error == 0 else f"{error:.1e}" for error in errors)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
