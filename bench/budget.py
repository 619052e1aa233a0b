"""Memory against time of a training step: standard autograd, checkpointing, three other libraries, and revflow by its budget.

    python bench/budget.py --json budget.json --figure budget.png

Each method (bench/methods.py) trains the same network (bench/networks.py) with the same parameters, after its gradients were
compared with standard autograd's (bench/trials.py). A step is a forward pass, a loss and a backward pass, in float32. The peak is
what it holds beyond what was there before, parameters and their gradients: by live tensors on the CPU, by the allocator on a
GPU. Every method runs once a round, in random order, each next to a step of standard autograd; a time is the median of the
ratios of the two. revflow's budgets are parts of the way from the peak that it plans for "none" to that for "all".

The three libraries are optional: bench/methods.py describes how to install them. A missing library is a row with that remark.

On a GPU give it something to do: --batch 32 --image 56 --tokens 1024 --frame 432.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import networks
import report
import trials
from methods import PEERS, Method, checkpointed, compiled, libraries, offloaded, planned, reversible, selective
from networks import Network
from trials import Row

PARTS = 8
"""Budgets divide the way from "none" to "all" in so many parts."""

MORE = {"offloaded": offloaded, "compiled": compiled}
"""Checkpointing of every coupling with its inputs in the host's memory; compiled with its checkpoints."""


def main() -> None:
    a = options()
    device = report.device_here()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    made = {
        "convolutions": partial(networks.convolutions, a.batch, a.image, device=device),
        "transformer": partial(networks.transformer, a.batch, a.tokens, device=device),
        "autoencoder": partial(networks.autoencoder, a.batch, a.frame, device=device),
    }
    about = f"{report.machine(device, packages=PEERS)}, {a.rounds} rounds"
    print(about)
    rows: list[Row] = []
    sections: list[str] = []
    for name in dict.fromkeys(a.only):
        found = compare(made[name], a.rounds, device, [MORE[more]() for more in a.more])
        lines = [cells(row, found[0]) for row in found]
        report.show(f"A training step: {name}, {found[0].size}", HEADINGS, lines, LEFT)
        print(verdict(found), flush=True)
        rows += found
        table = report.markdown_table(HEADINGS, lines, LEFT)
        sections.append(f"## {name}: {found[0].size}\n\n{table}\n\n{verdict(found)}\n")
    report.write(a, rows, report.markdown("Memory against time of a training step", about, sections), draw)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["convolutions", "transformer", "autoencoder"]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NETWORK", help=", ".join(names))
    parser.add_argument("--rounds", type=int, default=15, help="2 at least")
    parser.add_argument("--batch", type=int, default=4, help="revflow runs conditioners in 4 chunks of it")
    parser.add_argument("--image", type=int, default=16, help="height and width of the convolutions' streams")
    parser.add_argument("--tokens", type=int, default=128, help="of the transformer's sequences")
    parser.add_argument("--frame", type=int, default=96, help="height and width of the autoencoder's, a multiple of 8")
    parser.add_argument(
        "--more", nargs="+", choices=MORE, default=[], help="further checkpointing; compiling takes minutes"
    )
    report.add_outputs(parser)
    a = parser.parse_args()
    if min(a.batch, a.image, a.tokens, a.frame) < 1 or a.rounds < 2:
        parser.error("--batch, --image, --tokens and --frame must be at least 1, --rounds 2")
    if a.frame % 8:
        parser.error(f"--frame must be a multiple of 8, not {a.frame}")
    return a


def compare(make: Callable[[], Network], rounds: int, device: torch.device, more: Iterable[Method] = ()) -> list[Row]:
    """A row for each method: standard autograd first, then revflow's budgets from the smallest on."""
    low, high = (planned(make(), budget).peak for budget in ("none", "all"))
    budgets = [reversible(f"{part}/{PARTS}", low + (high - low) * part // PARTS) for part in range(1, PARTS)]
    methods = [
        *map(checkpointed, (1, 2, 4, 8)),
        selective(),
        *more,
        *libraries(),
        reversible("none, 4 chunks", chunks=4),
        reversible("none"),
        *budgets,
        reversible("all", "all"),
    ]
    return trials.compare([*trials.attempt_all(methods, make, device)], rounds, device)


def exceptions(rows: Iterable[Row]) -> list[tuple[Row, Row | None]]:
    """Points that no point of revflow's matches both in memory and in time, with revflow's fastest within that memory."""
    rows = [r for r in rows if r.peak is not None]
    found = []
    for other in (r for r in rows if r.method != "revflow"):
        within = [r for r in rows if r.method == "revflow" and r.peak <= other.peak]
        best = min(within, key=lambda r: r.time_ratio, default=None)
        if best is None or best.time_ratio > other.time_ratio:
            found.append((other, best))
    return found


def verdict(rows: list[Row]) -> str:
    """Whether revflow's curve lies left of or below every other point."""
    found = exceptions(rows)
    name = rows[0].network
    if not found:
        return f"{name}: for every other point there is one of revflow's that takes no more memory and no more time."
    lines = [
        f"{name}: for every other point there is one of revflow's that takes no more memory and no more time, except:"
    ]
    for row, best in found:
        lines.append(f"- {row.label}, {row.peak / 2**20:,.1f} MiB, takes {row.time_ratio:.2f}: {compared(row, best)}")
    return "\n".join(lines)


def compared(row: Row, best: Row | None) -> str:
    if best is None:
        return "revflow needs more memory"
    gap, error = best.time_ratio - row.time_ratio, (best.error**2 + row.error**2) ** 0.5
    return f"with its memory revflow takes {best.time_ratio:.2f}, {gap:.2f} ± {error:.2f} more"


HEADINGS = ("method", "setting", "peak, MiB", "peak, plain = 1", "time, plain = 1", "standard error, quartiles")
LEFT = ("method", "setting", "standard error, quartiles")


def cells(row: Row, plain: Row) -> tuple[str, ...]:
    """The row below `HEADINGS`; where it has no figures its note is the last."""
    if row.peak is None:
        return row.method, row.setting, "", "", "", row.note
    low, high = row.quartiles
    figures = f"{row.peak / 2**20:,.1f}", f"{row.peak / plain.peak:.3f}", f"{row.time_ratio:.2f}"
    return row.method, row.setting, *figures, f"± {row.error:.2f}, {low:.2f} to {high:.2f}"


class Style(NamedTuple):
    """How a method is drawn."""

    name: str
    colour: str
    marker: str
    size: float = 7
    line: str = "none"


STYLES = {
    "checkpoint": Style("checkpoint, every n blocks", "#c2571a", "s", 9, "-"),
    "selective": Style("selective checkpoint", "#a67c00", "P"),
    "memcnn": Style("memcnn", "#7a4fb5", "v"),
    "revtorch": Style("revtorch", "#1f8a5b", "^"),
    "revlib": Style("revlib", "#c23b7a", "D", 6),
    "revflow": Style("revflow, by its budget", "#2a6fb8", "o", 6, "-"),
    "chunks": Style("revflow, nothing stored, in chunks", "#6db3f2", "h", 8),
    "plain": Style("standard autograd", "#222222", "*", 11),
}


def draw(rows: list[Row]) -> Figure:
    """A panel a network: memory to the right, time upwards with its quartiles."""
    panels = [[*group] for _, group in groupby(rows, lambda row: row.network)]
    size = (4.2 * len(panels) + 0.4, 4.2)
    figure = Figure(size, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)
    for axis, panel in zip(axes[0], panels, strict=True):
        draw_panel(axis, [row for row in panel if row.peak is not None])
    axes[0, 0].set_ylabel("time, standard autograd = 1")
    handles = {h.get_label(): h for axis in axes[0] for h in axis.get_legend_handles_labels()[0]}
    figure.legend(handles=[*handles.values()], loc="outside lower center", ncols=min(4, 2 * len(panels)), frameon=False)
    return figure


def draw_panel(axis: Axes, rows: list[Row]) -> None:
    for key, style in STYLES.items():
        points = sorted((r for r in rows if style_of(r) == key), key=lambda r: r.peak)
        if not points:
            continue
        sizes, times = [r.peak / 2**20 for r in points], [r.time_ratio for r in points]
        axis.vlines(sizes, *zip(*(r.quartiles for r in points), strict=True), color=style.colour, alpha=0.3)
        look = {"color": style.colour, "marker": style.marker, "markersize": style.size, "linestyle": style.line}
        axis.plot(sizes, times, label=style.name, markeredgewidth=0.6, markeredgecolor="white", **look)
        if key == "checkpoint":
            for row, x, y in zip(points, sizes, times, strict=True):
                number = row.setting.removeprefix("every ")
                axis.annotate(number, (x, y), color="white", fontsize=6.5, ha="center", va="center_baseline")
    axis.set_title(rows[0].network, fontsize=11)
    axis.set_xlabel("peak memory, MiB")
    axis.set_xlim(left=0)
    axis.grid(color="#e4e4e4", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def style_of(row: Row) -> str:
    return "chunks" if "chunks" in row.setting else row.method


if __name__ == "__main__":
    main()
