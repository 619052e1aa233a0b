"""A training step in a compiled graph: standard autograd, checkpointing and revflow, each eager and compiled.

    python bench/compiled.py --json compiled.json --figure compiled.png

The graph is that of `torch.compile(forward, fullgraph=True)`. Rows with a budget are standard autograd with PyTorch's
`activation_memory_budget`, which recomputes what the compiler selects. "conditioners" is revflow with `compile_conditioners`.

Every step runs once per round, in random order, next to an eager step of standard autograd. A time is the median ratio of the
two. Memory comes from the profiler's allocations (bench/kit/profiled_memory.py). "Saved" is the memory in use between the forward
and the backward pass, in streams, and includes the output: two streams. Parameters and gradients exist before the step. The first
step compiles, and its time is that of the compilation, without the cache of an earlier run.

Needs a C++ compiler on the CPU.
"""

from __future__ import annotations

import argparse
import importlib
import random
import statistics
import time
import types
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

import revflow
from kit import host_allocator, trials
from kit.compiled_row import Row
from kit.methods import Method, checkpointed, plain, reversible
from kit.networks import Network
from kit.profiled_memory import peak_and_kept
from pages import report
from pages.compiled_figure import draw
from pages.tables import markdown_table, show

BUDGETS = 0.1, 0.3, 0.5
"""Shares of the activations that PyTorch's partitioner may store."""

TOLERANCE = 1e-4
"""Of gradients in float32."""


@dataclass(frozen=True)
class Contender:
    """A method to measure."""

    method: Method
    setting: str = ""
    budget: float | None = None


CONTENDERS = [
    Contender(plain()),
    Contender(plain(), "one graph"),
    *[Contender(plain(), f"one graph, budget {budget}", budget) for budget in BUDGETS],
    Contender(checkpointed(1)),
    Contender(checkpointed(1), "one graph"),
    Contender(reversible("min")),
    Contender(reversible("min"), "conditioners"),
    Contender(reversible("min"), "one graph"),
]


def main() -> None:
    a = options()
    device = report.device_here()
    host_allocator.keep_freed_memory()
    torch.set_num_threads(1)
    about = f"{report.machine(device)}, {a.rounds} rounds"
    print(about)
    rows: list[Row] = []
    sections: list[str] = []
    for name in dict.fromkeys(a.only):
        found = compare(partial(made, name, device, a.blocks), a.rounds, device)
        lines = [cells(row) for row in found]
        show(f"A training step: {name}, {found[0].size}", HEADINGS, lines, LEFT)
        rows += found
        sections.append(f"## {name}: {found[0].size}\n\n{markdown_table(HEADINGS, lines, LEFT)}\n")
    report.write(a, rows, report.markdown("A training step in a compiled graph", about, sections), draw)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*NETWORKS]
    listed = f"networks to train: {', '.join(names)} (all)"
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NETWORK", help=listed)
    parser.add_argument("--blocks", type=report.positive, help="number of blocks (16 of tiny, 8 of the others)")
    parser.add_argument("--rounds", type=int, default=25, help="number of timed steps per method, at least 2 (25)")
    report.add_outputs(parser)
    a = parser.parse_args()
    if a.rounds < 2:
        parser.error("--rounds must be at least 2")
    return a


def tiny() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8))


def mlp() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))


def convolution() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(32, 32, 3, padding=1), nn.GroupNorm(1, 32), nn.SiLU(), nn.Conv2d(32, 32, 3, padding=1)
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, tuple[int, ...]]] = {
    "tiny": (tiny, 16, (256, 16)),
    "mlp": (mlp, 8, (512, 128)),
    "convolutions": (convolution, 8, (4, 64, 16, 16)),
}
"""By name: the conditioner, the number of blocks, and the shape of the input."""


def made(name: str, device: torch.device, depth: int | None = None) -> Network:
    conditioner, blocks, shape = NETWORKS[name]
    blocks = depth or blocks
    torch.manual_seed(0)
    stream = " x ".join(map(str, (shape[0], shape[1] // 2, *shape[2:])))
    couplings: list[nn.Module] = [revflow.AdditiveCoupling(conditioner()).to(device) for _ in range(blocks)]
    leaf = torch.randn(shape, device=device, requires_grad=True)
    return Network(name, f"{blocks} blocks, {stream} per stream", couplings, leaf).to(torch.float32)


class Runner:
    """A contender's step on its own copy of the network."""

    def __init__(self, contender: Contender, network: Network, device: torch.device) -> None:
        self.contender, self.network, self._device = contender, network, device
        forward = contender.method.of(network).forward
        if contender.setting == "conditioners":
            sequence = revflow.ReversibleSequence(network.blocks, network.split_dim).compile_conditioners()
            forward = lambda x: sequence(network.parted(x))  # noqa: E731
        elif contender.setting:
            forward = torch.compile(_with_code_of_its_own(forward), fullgraph=True)
        self.forward = forward
        began = time.perf_counter()
        with _budget(contender.budget):
            self.step()
        self.compile_seconds = time.perf_counter() - began if contender.setting else None

    def step(self, between: Callable[[], None] = lambda: None) -> Tensor:
        return self.network.step(self.forward, between)

    @property
    def gradients(self) -> list[Tensor]:
        """Of one step."""
        for parameter in self.network.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.step()
        return [p.grad for p in self.network.parameters if p.grad is not None]

    def memory(self) -> tuple[int, float]:
        """The peak of a step, and the streams in use after the forward pass, besides the input."""
        stream = self.network.leaf.nbytes / self.network.inputs
        peak, _ = peak_and_kept(self.step, self._device)
        x = self.network.leaf.detach().clone().requires_grad_()
        _, kept = peak_and_kept(lambda: self.forward(x), self._device)
        return peak, kept / stream


def compare(make: Callable[[], Network], rounds: int, device: torch.device) -> list[Row]:
    """A row for each contender. RuntimeError if the gradients differ from those of standard autograd."""
    torch.compiler.reset()
    runners = [Runner(contender, make(), device) for contender in CONTENDERS]
    expected = runners[0].gradients
    for runner in runners:
        for a, b in zip(runner.gradients, expected, strict=True):
            if (a - b).norm() > TOLERANCE * b.norm():
                raise RuntimeError(f"{runner.contender}: a gradient differs by {(a - b).norm() / b.norm():.1e}")
    ratios: list[list[float]] = [[] for _ in runners]
    order = random.Random(0)
    for _ in range(rounds):
        for i in order.sample(range(len(runners)), len(runners)):
            pair = order.sample([("plain", runners[0]), ("its", runners[i])], 2)
            times = {name: sum(trials.seconds(runner.step, device)) for name, runner in pair}
            ratios[i].append(times["its"] / times["plain"])
    return [row(runner, found) for runner, found in zip(runners, ratios, strict=True)]


def row(runner: Runner, ratios: list[float]) -> Row:
    network, contender = runner.network, runner.contender
    peak, saved = runner.memory()
    low, middle, high = statistics.quantiles(ratios, n=4)
    names = network.name, network.size, contender.method.name, contender.setting
    return Row(*names, middle, (low, high), round(saved, 2), peak, runner.compile_seconds)


_numbers = count()


def _with_code_of_its_own(forward: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """The same function. PyTorch stores compiled graphs by code object, and would reuse that of another budget."""

    def run(x: Tensor) -> Any:
        return forward(x)

    code = run.__code__.replace(co_name=f"run_{next(_numbers)}")
    return types.FunctionType(code, globals(), closure=run.__closure__)


def _budget(share: float | None) -> AbstractContextManager[Any]:
    """A context in which graphs are compiled with PyTorch's `activation_memory_budget`."""
    if share is None:
        return nullcontext()
    config = importlib.import_module("torch._functorch.config")  # PyTorch documents this option, in a private module
    context: AbstractContextManager[Any] = config.patch(activation_memory_budget=share)
    return context


HEADINGS = ("method", "setting", "time, plain = 1", "quartiles", "saved, streams", "peak, KiB", "compilation, s")
LEFT = ("method", "setting", "quartiles")


def cells(row: Row) -> tuple[str, ...]:
    """The row below `HEADINGS`."""
    low, high = row.quartiles
    seconds = "" if row.compile_seconds is None else f"{row.compile_seconds:.1f}"
    figures = f"{row.time_ratio:.2f}", f"{low:.2f} to {high:.2f}", f"{row.saved_streams:.1f}"
    return row.method, row.setting or "eager", *figures, f"{row.peak / 1024:,.0f}", seconds


if __name__ == "__main__":
    main()
