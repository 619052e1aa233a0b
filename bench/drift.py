"""What rounding does to a reversible chain, by its depth: in floating point, and on a grid (exact=True).

    OMP_NUM_THREADS=1 python bench/drift.py --depths 10 30 100 300 1000 --out docs/images/drift.png

Additive blocks with conditioners conv3x3, GroupNorm, SiLU, conv3x3, untrained, on the CPU, in one thread, without the guard.
Two errors of each chain, the largest of those of `--networks` networks:

- of the input that the backward pass has rebuilt: the largest difference from the input seen in the forward pass, over the
  largest value there, of the stream that the first block's conditioner is given;
- of the parameters' gradients: the L2 norm of their difference from those of `net.plain`, over the norm of these.

Both runs of a network compute alike: plain under autocast too, with its cache off (cached weights alone move gradients), and
plain on the grid where the chain is. Prints tables; draws both errors where `--out` says so.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

import revflow


class Arithmetic(NamedTuple):
    """What a chain computes with, and how it is drawn."""

    name: str
    exact: bool
    autocast: bool
    colour: str
    marker: str


ARITHMETICS = (
    Arithmetic("float32", False, False, "#2a6fb8", "o"),
    Arithmetic("float32 streams, bf16 autocast", False, True, "#c2571a", "s"),
    Arithmetic("exact", True, False, "#1f8a5b", "D"),
    Arithmetic("exact, bf16 autocast", True, True, "#7a4fb5", "x"),
)


class Errors(NamedTuple):
    """Relative to what they are errors of."""

    rebuilt: float
    gradients: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[10, 30, 100, 300, 1000], help="numbers of blocks")
    parser.add_argument("--channels", type=int, default=8, help="of each of the two streams")
    parser.add_argument("--size", type=int, default=16, help="height and width")
    parser.add_argument("--networks", type=int, default=3, help="the largest error of so many is reported")
    parser.add_argument("--out", type=Path, help="a PNG to draw")
    a = parser.parse_args()
    if min(*a.depths, a.channels, a.size, a.networks) < 1:
        parser.error("--depths, --channels, --size and --networks must be at least 1")
    if a.out is not None and not a.out.parent.is_dir():
        parser.error(f"--out {a.out}: there is no folder {a.out.parent}")
    torch.set_num_threads(1)
    print(f"{platform.machine()}, 1 thread, Python {platform.python_version()}, torch {torch.__version__}")
    print(f"streams of 1 x {a.channels} x {a.size} x {a.size}, largest of {a.networks} networks")
    found = {
        arithmetic: [measure(arithmetic, depth, a.channels, a.size, a.networks) for depth in a.depths]
        for arithmetic in ARITHMETICS
    }
    for name in Errors._fields:
        print(f"\n{name}\n\n{table(name, a.depths, found)}")
    if a.out is not None:
        draw(a.depths, found).savefig(a.out, dpi=160)


def measure(arithmetic: Arithmetic, depth: int, channels: int, size: int, networks: int) -> Errors:
    """The largest errors of so many networks, each with an input of its own."""
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
    rebuilt: list[Tensor] = []

    def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        (rebuilt if revflow.is_recomputing() else seen).append(inputs[0].detach().clone())

    hook = net[0].F.register_forward_pre_hook(look)
    found = gradients(net, net, x, autocast)
    hook.remove()
    plain = gradients(net, net.plain, x, autocast)
    (before,), (after,) = seen, rebuilt
    return Errors(
        ((after - before).abs().max() / before.abs().max()).item(), ((found - plain).norm() / plain.norm()).item()
    )


def gradients(net: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor, autocast: bool) -> Tensor:
    """Those of all parameters, in one vector of float64."""
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


def table(name: str, depths: list[int], found: dict[Arithmetic, list[Errors]]) -> str:
    rows = [["blocks", *(arithmetic.name for arithmetic in found)], ["---"] * (1 + len(found))]
    for k, depth in enumerate(depths):
        errors = [getattr(of[k], name) for of in found.values()]
        rows.append([str(depth), *("0" if error == 0 else f"{error:.1e}" for error in errors)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


INK, PALE = "#1c1c1c", "#d9d9d9"
SIGNS = {"D": "◇", "x": "×"}
"""Markers in a line of text."""
SMALLEST = 1e-8
"""Below this the axis is linear, and ends at 0."""


def draw(depths: list[int], found: dict[Arithmetic, list[Errors]]) -> Figure:
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 4.6), sharey=True, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)  # type: ignore[union-attr, call-arg]
    titles = ("Input recomputed by the backward pass", "Gradients of the parameters")
    for panel, name, title in zip(panels, Errors._fields, titles, strict=True):
        draw_panel(panel, depths, {arithmetic: [getattr(e, name) for e in of] for arithmetic, of in found.items()})
        panel.set_title(title, loc="left", fontsize=11, color=INK)
    panels[0].set_ylabel("relative error", color=INK)
    return figure


def draw_panel(panel: Axes, depths: list[int], found: dict[Arithmetic, list[float]]) -> None:
    panel.set_xscale("log")
    panel.set_yscale("symlog", linthresh=SMALLEST, linscale=1.3)
    panel.set_ylim(-0.25 * SMALLEST, 4)
    panel.set_yticks([0, *(10.0**e for e in range(-8, 1, 2))], ["0", *(f"$10^{{{e}}}$" for e in range(-8, 0, 2)), "1"])
    panel.set_yticks([], minor=True)
    panel.set_xticks(depths, [str(depth) for depth in depths])
    panel.set_xticks([], minor=True)
    panel.set_xlabel("blocks", color=INK)
    panel.tick_params(colors=INK, length=0)
    panel.grid(color=PALE, linewidth=0.6)
    panel.spines[:].set_visible(False)
    for height, (arithmetic, errors) in enumerate(found.items()):
        exact, label = arithmetic.exact, arithmetic.name
        if exact and not any(errors):
            label = f"{SIGNS[arithmetic.marker]} {label}: 0, equal to the last bit"
        panel.plot(
            depths, errors, color=arithmetic.colour, marker=arithmetic.marker, linewidth=1 if exact else 1.8,
            markersize=8 if exact else 5, markerfacecolor="none" if exact else arithmetic.colour, clip_on=False, zorder=3,
        )  # fmt: skip
        panel.annotate(  # the exact ones lie upon each other, and so have their labels one above the other
            label, (depths[-1], errors[-1]), (0, 9 + 13 * (len(found) - 1 - height) * exact), textcoords="offset points",
            ha="right", color=arithmetic.colour, fontsize=9.5,
        )  # fmt: skip


if __name__ == "__main__":
    main()
