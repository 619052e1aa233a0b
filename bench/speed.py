"""Time of a training step: standard autograd, checkpointing, three other libraries and revflow, on the same networks in one run.

    python bench/speed.py --json speed.json --figure speed.png

Networks are tiny blocks, convolutions of 64 channels, a transformer (bench/kit/networks.py), and all of CrevNet under the
schedules of bench/kit/schedules.py. bench/kit/trials.py compares the methods. Every step runs once per round, in random order,
next to one of standard autograd, and a time is the median ratio to that one. The row "plain" is standard autograd against
itself, and shows the machine's noise.

The table also has the times of the forward pass, of the backward pass, which includes recomputation, and of the inverse, which
computes the input from the output without a graph. On CrevNet the optimizer's step counts with the backward pass, and the peak
includes the parameters, their gradients and Adam's state. On the other networks the peak does not include parameters and
gradients. Evaluations are those of a conditioner per step; on CrevNet of a recurrent cell, per time step.

Under `--precision bf16-mixed` and `16-mixed` each conditioner is under autocast by itself, as the other libraries would
recompute it in float32. With `--compile` conditioners are compiled, for every method; peaks on the CPU are those without. On a
GPU (--image 56 --batch 32 --only convolutions, and so on) the table also has the useful operations per second, as a share of
the rate of matrix products in the same precision.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from crevnet import PRESETS
from kit import networks, rates, trials
from kit.crevnet_trials import Prepared, of_crevnet, operations_of_crevnet
from kit.libraries import PEERS, libraries
from kit.methods import Method, checkpointed, plain, reversible
from kit.networks import Network
from kit.precisions import PRECISIONS, prepared, set_precision
from kit.schedules import SCHEDULES
from kit.time_row import Row
from pages import report
from pages.speed_figure import draw
from pages.tables import markdown_table, show


class Extent(NamedTuple):
    """A network's default batch size and number of rounds."""

    batch: int
    rounds: int


NETWORKS = {
    "tiny": Extent(256, 60),
    "convolutions": Extent(4, 11),
    "transformer": Extent(4, 15),
    "crevnet": Extent(2, 7),
}

METHODS = [
    checkpointed(1),
    checkpointed(None),
    *libraries(),
    reversible("min"),
    reversible("min, guard off", guard="off"),
    reversible("max", "max"),
]


def main() -> None:
    a = options()
    device = report.device_here()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    set_precision(a.precision)
    about = report.machine(device, packages=PEERS)
    print(about)
    rows: list[Row] = []
    sections: list[str] = []
    for name in dict.fromkeys(a.only):
        extent = Extent(a.batch or NETWORKS[name].batch, a.rounds or NETWORKS[name].rounds)
        found = compare(name, extent, a, device)
        title = f"{found[0].network}: {found[0].size}, {described(found[0])}, {extent.rounds} rounds"
        headings = HEADINGS if device.type == "cuda" else HEADINGS[:-1]
        lines = [cells(row)[: len(headings)] for row in found]
        show(f"A training step of {title}", headings, lines, LEFT)
        rows += found
        sections.append(f"## {title}\n\n{markdown_table(headings, lines, LEFT)}\n")
    report.write(a, rows, report.markdown("Time of a training step", about, sections), draw)


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own = {
        field: ", ".join(f"{getattr(e, field)} ({name})" for name, e in NETWORKS.items()) for field in Extent._fields
    }
    names = [*NETWORKS]
    listed = f"networks to train: {', '.join(names)} (all)"
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NETWORK", help=listed)
    parser.add_argument(
        "--rounds", type=report.positive, help=f"number of timed steps per method, at least 2 ({own['rounds']})"
    )
    parser.add_argument("--batch", type=report.positive, help=f"batch size, samples ({own['batch']})")
    parser.add_argument("--precision", choices=PRECISIONS, default="32-true", help="precision (32-true)")
    parser.add_argument("--compile", action="store_true", help="compilation of the conditioners")
    number = partial(parser.add_argument, type=report.positive)
    number("--image", default=16, help="height and width of the convolutions' streams, pixels (16)")
    number("--tokens", default=128, help="length of the transformer's sequences, tokens (128)")
    crevnet = parser.add_argument_group("CrevNet")
    number = partial(crevnet.add_argument, type=report.positive)
    crevnet.add_argument("--preset", choices=PRESETS, default="tiny", help="preset (tiny)")
    listed = f"schedules, in addition to plain: {', '.join(SCHEDULES)} (all)"
    crevnet.add_argument(
        "--schedule",
        nargs="+",
        choices=SCHEDULES,
        default=list(SCHEDULES),
        metavar="SCHEDULE",
        help=listed,
    )
    number("--steps", default=11, help="number of time steps (11)")
    crevnet.add_argument("--channels-last", action="store_true", help="channels_last layout of the convolutions")
    number("--height", default=128, help="height of the frames, pixels (128)")
    number("--width", default=112, help="width of the frames, pixels (112)")
    report.add_outputs(parser)
    a = parser.parse_args(arguments)
    if a.rounds == 1:
        parser.error("--rounds must be at least 2: one has no spread")
    if a.precision == "tf32" and not torch.cuda.is_available():
        parser.error("--precision tf32: there is no CUDA device here")
    return a


def compare(
    name: str, extent: Extent, a: argparse.Namespace, device: torch.device, methods: Sequence[Method] = METHODS
) -> list[Row]:
    """A row for each method, standard autograd first."""
    if name == "crevnet":
        size = extent.batch, a.steps, a.height, a.width
        training = Prepared(
            a.preset, "plain", "32-true", *size, device, compiled=a.compile, channels_last=a.channels_last
        )
        tried = [*of_crevnet(training, a.schedule, a.precision)]
        useful = partial(operations_of_crevnet, training)
    else:
        make = partial(maker(name, a), extent.batch, device=device)
        prepare = partial(prepared, precision=a.precision, compiled=a.compile, device=device)
        tried = [*trials.attempt_all(methods, make, device, prepare)]
        useful = partial(operations_of, make)
    rows = trials.compare(tried, extent.rounds, device)
    if device.type == "cuda":
        rows = shares(rows, useful(), rates.matrix_rate(device, PRECISIONS[a.precision] or torch.float32))
    layout = a.channels_last and name == "crevnet"
    return [replace(row, precision=a.precision, compiled=a.compile, channels_last=layout) for row in rows]


def maker(name: str, a: argparse.Namespace) -> Callable[..., Network]:
    if name == "convolutions":
        return partial(networks.convolutions, size=a.image)
    if name == "transformer":
        return partial(networks.transformer, tokens=a.tokens)
    return networks.tiny


def shares(rows: Sequence[Row], useful: float, rate: float) -> list[Row]:
    """With their throughput, from a step's useful operations and the rate of matrix products."""
    return [row if row.seconds is None else replace(row, throughput=useful / row.seconds / rate) for row in rows]


def operations_of(make: Callable[[], Network]) -> float:
    """Useful floating-point operations of a step."""
    network = make()
    return rates.operations(partial(plain().of(network).forward, network.leaf))


def described(row: Row) -> str:
    return row.precision + ", compiled" * row.compiled + ", channels last" * row.channels_last


HEADINGS = (
    "method", "setting", "time, plain = 1", "standard error, quartiles", "forward", "backward", "inverse", "evaluations",
    "ms per step", "peak, MiB", "of matrix rate",
)  # fmt: skip
LEFT = ("method", "setting", "standard error, quartiles")


def cells(row: Row) -> tuple[str, ...]:
    """The row below `HEADINGS`. If it has no figures, its note takes a cell of theirs."""
    figures = row.figures
    if figures is None:
        return row.method, row.setting, "", row.note, *[""] * (len(HEADINGS) - 4)
    low, high = figures.quartiles
    return (
        row.method,
        row.setting,
        f"{figures.time_ratio:.2f}",
        f"± {figures.error:.2f}, {low:.2f} to {high:.2f}",
        f"{figures.forward:.2f}",
        f"{figures.backward:.2f}",
        "" if row.inverse is None else f"{row.inverse:.2f}",
        "" if row.evaluations is None else f"{row.evaluations:.2f}",
        f"{1e3 * figures.seconds:,.1f}",
        f"{figures.peak / 2**20:,.2f}",
        "" if row.throughput is None else f"{row.throughput:.0%}",
    )


if __name__ == "__main__":
    main()
