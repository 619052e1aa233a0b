"""Memory against time of a training step: standard autograd, checkpointing, three other libraries, and revflow by its budget.

    python bench/budget.py --json budget.json --figure budget.png

Each method (bench/kit/methods.py) trains the same network (bench/kit/networks.py) with the same parameters, after its gradients
were compared with standard autograd's (bench/kit/trials.py). A step is a forward pass, a loss and a backward pass, in float32.
The peak does not include memory from before the step: parameters and their gradients. It counts live tensors on the CPU, and
the allocator's bytes on a GPU. Every method runs once per round, in random order, each next to a step of standard autograd. A
time is the median ratio of the two. revflow's budgets are eighths of the way from its planned peak for "min" to that for
"max".

The three libraries are optional: bench/kit/libraries.py describes how to install them. A missing library is a row with that
remark.

Use larger sizes on a GPU: --batch 32 --image 56 --tokens 1024 --frame 432.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from functools import partial

import torch

from kit import networks, trials
from kit.libraries import PEERS, libraries
from kit.methods import Method, checkpointed, compiled, offloaded, planned, reversible, selective
from kit.networks import Network
from kit.trials import Row
from pages import report
from pages.budget_figure import draw
from pages.tables import markdown_table, show

PARTS = 8
"""Number of steps of the budgets from "min" to "max"."""

MORE = {"offloaded": offloaded, "compiled": compiled}
"""Checkpointing of every coupling, with its inputs in the host's memory, or compiled within its checkpoint."""


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
        show(f"A training step: {name}, {found[0].size}", HEADINGS, lines, LEFT)
        print(verdict(found), flush=True)
        rows += found
        table = markdown_table(HEADINGS, lines, LEFT)
        sections.append(f"## {name}: {found[0].size}\n\n{table}\n\n{verdict(found)}\n")
    report.write(a, rows, report.markdown("Memory against time of a training step", about, sections), draw)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["convolutions", "transformer", "autoencoder"]
    listed = f"networks to train: {', '.join(names)} (all)"
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NETWORK", help=listed)
    parser.add_argument("--rounds", type=int, default=15, help="number of timed steps per method, at least 2 (15)")
    parser.add_argument("--batch", type=int, default=4, help="batch size, samples, of which revflow takes 4 chunks (4)")
    parser.add_argument(
        "--image", type=int, default=16, help="height and width of the convolutions' streams, pixels (16)"
    )
    parser.add_argument("--tokens", type=int, default=128, help="length of the transformer's sequences, tokens (128)")
    parser.add_argument(
        "--frame",
        type=int,
        default=96,
        help="height and width of the autoencoder's frames, pixels, a multiple of 8 (96)",
    )
    parser.add_argument(
        "--more",
        nargs="+",
        choices=MORE,
        default=[],
        help="additional kinds of checkpointing; compiling takes minutes (none)",
    )
    report.add_outputs(parser)
    a = parser.parse_args()
    if min(a.batch, a.image, a.tokens, a.frame) < 1 or a.rounds < 2:
        parser.error("--batch, --image, --tokens and --frame must be at least 1, --rounds 2")
    if a.frame % 8:
        parser.error(f"--frame must be a multiple of 8, not {a.frame}")
    return a


def compare(make: Callable[[], Network], rounds: int, device: torch.device, more: Iterable[Method] = ()) -> list[Row]:
    """A row for each method: standard autograd first, revflow's budgets in increasing order."""
    low, high = (planned(make(), budget).peak for budget in ("min", "max"))
    budgets = [reversible(f"{part}/{PARTS}", low + (high - low) * part // PARTS) for part in range(1, PARTS)]
    methods = [
        *map(checkpointed, (1, 2, 4, 8)),
        selective(),
        *more,
        *libraries(),
        reversible("min, 4 chunks", chunks=4),
        reversible("min"),
        *budgets,
        reversible("max", "max"),
    ]
    return trials.compare([*trials.attempt_all(methods, make, device)], rounds, device)


def exceptions(rows: Iterable[Row]) -> list[tuple[Row, Row | None]]:
    """Points that no point of revflow's matches both in memory and in time, with revflow's fastest within that memory."""
    points = [(row, figures) for row in rows if (figures := row.figures)]
    found: list[tuple[Row, Row | None]] = []
    for other, its in points:
        if other.method == "revflow":
            continue
        within = [(r, f) for r, f in points if r.method == "revflow" and f.peak <= its.peak]
        best = min(within, key=lambda point: point[1].time_ratio, default=None)
        if best is None or best[1].time_ratio > its.time_ratio:
            found.append((other, best[0] if best else None))
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
    return "\n".join([*lines, *(f"- {compared(row, best)}" for row, best in found)])


def compared(row: Row, best: Row | None) -> str:
    its, revflows = row.figures, best.figures if best else None
    assert its is not None
    point = f"{row.label}, {its.peak / 2**20:,.1f} MiB, takes {its.time_ratio:.2f}"
    if revflows is None:
        return f"{point}: revflow needs more memory"
    gap, error = revflows.time_ratio - its.time_ratio, (revflows.error**2 + its.error**2) ** 0.5
    return f"{point}: with its memory revflow takes {revflows.time_ratio:.2f}, {gap:.2f} ± {error:.2f} more"


HEADINGS = ("method", "setting", "peak, MiB", "peak, plain = 1", "time, plain = 1", "standard error, quartiles")
LEFT = ("method", "setting", "standard error, quartiles")


def cells(row: Row, plain: Row) -> tuple[str, ...]:
    """The row below `HEADINGS`. If it has no figures, its note is the last."""
    its, standard = row.figures, plain.figures
    if its is None or standard is None:
        return row.method, row.setting, "", "", "", row.note
    low, high = its.quartiles
    figures = f"{its.peak / 2**20:,.1f}", f"{its.peak / standard.peak:.3f}", f"{its.time_ratio:.2f}"
    return row.method, row.setting, *figures, f"± {its.error:.2f}, {low:.2f} to {high:.2f}"


if __name__ == "__main__":
    main()
