"""Memory against time of a training step: standard autograd, checkpointing, three other libraries, and revflow by its budget.

    python bench/budget.py --json budget.json --figure budget.png

Each method (bench/kit/methods.py) trains the same network (bench/kit/networks.py) with the same parameters, after its gradients
were compared with standard autograd's (bench/kit/trials.py). A step is a forward pass, a loss and a backward pass, in float32.
The peak does not include memory from before the step: parameters and their gradients. It counts live tensors on the CPU, and
the allocator's bytes on a GPU. Every method runs once per round, in random order, each next to a step of standard autograd. A
time is the median ratio of the two. The C library keeps freed memory, as CUDA's allocator does (bench/kit/host_allocator.py).

For each other method there is a row of revflow with that method's memory, such as "as checkpoint every 1". Its budget is the
largest one with which revflow's measured peak is at most the method's measured peak. It is found by bisection, in the same way
for every method (bench/kit/budgets.py). The verdict compares the two rows. If revflow takes over 0.01 of standard autograd's time
more, the verdict gives a count of operations for both. The other budgets of revflow are eighths of the way from its planned peak
for "min" to that for "max".

On the CPU, offloaded checkpointing leaves its tensors where they are: in the host's memory. It has a row, but is not compared.

The three libraries are optional: bench/kit/libraries.py describes how to install them. A missing library is a row with that
remark.

Use larger sizes on a GPU: --batch 32 --image 56 --tokens 1024 --frame 432.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from kit import host_allocator, networks, operations, trials
from kit.budgets import Budgets
from kit.libraries import PEERS, libraries
from kit.methods import Method, checkpointed, compiled, offloaded, plain, reversible, selective
from kit.networks import Network
from kit.time_row import Figures, Row
from kit.trials import Trial
from pages import report
from pages.budget_figure import draw
from pages.tables import markdown_table, show

PARTS = 8
"""Number of steps of the budgets from "min" to "max"."""

TOLERANCE = 0.01
"""The part of standard autograd's time that revflow may take more than another method with the same memory."""

AS = "as "
"""Begins the setting of a row of revflow with another method's memory."""

MORE = {"compiled": compiled}
"""Checkpointing of every coupling, compiled within its checkpoint."""


def main() -> None:
    a = options()
    device = report.device_here()
    host_allocator.keep_freed_memory()
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


def compare(
    make: Callable[[], Network], rounds: int, device: torch.device, more: Iterable[Method] = (), parts: int = PARTS
) -> list[Row]:
    """A row for each method: standard autograd first, then others, revflow's budgets, and revflow with the others' memory."""
    subject = trials.subject(make, device)
    budgets = Budgets(subject.network, device)
    curve = [reversible(f"{part}/{parts}", budgets.part(part, parts)) for part in range(1, parts)]
    chunks = reversible("min, 4 chunks", chunks=4)
    others = [*map(subject.attempt, [plain(), *standing(), *more])]
    own = [*map(subject.attempt, [chunks, reversible("min"), *curve, reversible("max", "max")])]
    own += map(subject.attempt, with_memory_of(others, budgets))
    return trials.compare([*map(counted, (*others, *own))], rounds, device)


def points_only(make: Callable[[], Network], rounds: int, device: torch.device, methods: Iterable[Method]) -> list[Row]:
    """A row for standard autograd, for each of the methods, and for revflow with its memory."""
    subject = trials.subject(make, device)
    others = [*map(subject.attempt, [plain(), *methods])]
    own = map(subject.attempt, with_memory_of(others[1:], Budgets(subject.network, device)))
    return trials.compare([*map(counted, (*others, *own))], rounds, device)


def standing() -> list[Method]:
    """The methods to compare revflow with, apart from standard autograd."""
    return [*map(checkpointed, (1, 2, 4, 8)), selective(), offloaded(), *libraries()]


def with_memory_of(others: Iterable[Trial], budgets: Budgets) -> Iterator[Method]:
    """revflow with the memory of each other method that is compared, unless revflow's smallest budget takes more."""
    for other in others:
        if other.memory is None or not is_compared(other.setting, other.memory.how):
            continue
        budget = budgets.within(other.memory.peak)
        if budget is not None:
            yield reversible(AS + other.label, budget)


def is_compared(setting: str, how: str | None) -> bool:
    """Whether a method's memory is all in one place. `how` it was measured shows the device."""
    return setting != offloaded().setting or how == "cuda"


def counted(trial: Trial) -> Trial:
    """With a count of its step's operations, which does not see those of compiled code."""
    if trial.step and trial.evaluations:
        trial.operations = operations.counted(partial(trial.step, trials.nothing))
    return trial


class Point(NamedTuple):
    """Another method, and revflow with the method's memory; None if revflow needs more."""

    other: Row
    its: Figures
    own: Row | None

    @property
    def gap(self) -> float:
        """revflow's additional time, in units of standard autograd's."""
        if self.own is None or self.own.time_ratio is None:
            return float("inf")
        return self.own.time_ratio - self.its.time_ratio


def points(rows: Iterable[Row]) -> list[Point]:
    """All points to compare."""
    own = {row.setting: row for row in rows if row.method == "revflow"}
    return [
        Point(row, figures, own.get(AS + row.label))
        for row in rows
        if row.method != "revflow" and (figures := row.figures) and is_compared(row.setting, row.how)
    ]


def verdict(rows: list[Row]) -> str:
    """At how many points revflow is as fast as the other method, and the comparison of each."""
    found = points(rows)
    within = sum([point.gap <= TOLERANCE for point in found])
    head = (
        f"{rows[0].network}: with the memory of another method, revflow takes at most {TOLERANCE} of standard autograd's time "
        f"more than that method at {within} of {len(found)} points."
    )
    return "\n".join([head, *(f"- {compared(point)}" for point in found)])


def compared(point: Point) -> str:
    other, its, own = point
    place = f"{other.label}, {its.peak / 2**20:,.1f} MiB, takes {its.time_ratio:.2f}"
    if own is None or (mine := own.figures) is None:
        return f"{place}: revflow needs more memory"
    error = (mine.error**2 + its.error**2) ** 0.5
    more = f"{abs(point.gap):.3f} ± {error:.3f} {'more' if point.gap > 0 else 'less'}"
    line = f"{place}: revflow takes {mine.time_ratio:.2f} in {mine.peak / 2**20:,.1f} MiB, {more}"
    return line if point.gap <= TOLERANCE else f"{line}. {reason(own, other)}"


def reason(own: Row, other: Row) -> str:
    """Both rows' counts of operations per step."""
    counts = [
        ("convolutions", own.convolutions, other.convolutions),
        ("matrix products", own.products, other.products),
        ("million floating-point operations", own.flops and own.flops // 10**6, other.flops and other.flops // 10**6),
        ("calls of operators", own.calls, other.calls),
    ]
    texts = [f"{mine:,d} {name}, compared with {its:,d}" for name, mine, its in counts if mine and its]
    return f"Per step, it runs {'; '.join(texts)}" if texts else "Its operations are not counted"


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
