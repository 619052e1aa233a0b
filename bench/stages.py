"""Predicted memory of a training step of networks with and without stages: standard autograd, checkpointing, revflow, and both.

    python bench/stages.py --csv bench/results/stages.csv --markdown bench/results/stages.md
    python bench/stages.py --only resnet-50 --batch 64

Networks and ways are those of bench/kit/staged.py. "plain" is standard autograd, and "checkpoint" is PyTorch's activation
checkpointing of every block. "reversible" applies revflow to the blocks between two transitions (strided blocks, blocks that
change the width, upsampling). "mixed" checkpoints the transitions, and the stages of a single block.

A step is a forward and a backward pass in float32, with BatchNorm in train mode. Peaks are predicted with fake tensors, which
have shapes and no data. A device needs more: workspaces, the gaps of the allocator and, with CUDA, half a GiB of its own. A peak
includes the input. Parameters and gradients are allocated before the step, are not part of the peak, and have their own column.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
from torch import nn

import revflow
from kit import staged
from kit.memory_row import GIB
from kit.staged import WAYS, Way
from pages import report
from pages.tables import markdown_table, show


@dataclass(frozen=True)
class Network:
    """A network to be made in each way, and its input."""

    title: str
    make: Callable[[Way], nn.Module]
    sample: tuple[int, ...]
    """The shape of one sample."""
    batch: int


NETWORKS = {
    "resnet-50": Network("ResNet-50", lambda way: staged.resnet((3, 4, 6, 3), way), (3, 224, 224), 256),
    "resnet-152": Network("ResNet-152", lambda way: staged.resnet((3, 8, 36, 3), way), (3, 224, 224), 256),
    "segresnet": Network("SegResNet", lambda way: staged.SegResNet((1, 2, 2, 4), way, 32), (4, 160, 192, 128), 1),
    "segresnet-deep": Network("SegResNet, deep", lambda way: staged.SegResNet((6, 8, 8, 8), way, 32), (4, 160, 192, 128), 1),
    "llama-16": Network("Llama, 16 layers", lambda way: staged.llama(16, 2048, way), (2048, 2048), 8),
    "llama-32": Network("Llama, 32 layers", lambda way: staged.llama(32, 1024, way), (4096, 1024), 8),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    network: str
    sample: str
    batch: int
    way: Way
    parameters: int
    """Bytes of the parameters; their gradients are as many."""
    peak: int
    """Bytes beyond parameters and gradients."""


HEADINGS = ("network", "sample", "batch", "parameters and gradients, GiB", *(f"{way}, GiB" for way in WAYS))
LEFT = ("network", "sample")


def main() -> None:
    a = options()
    rows: list[Row] = []
    for name in dict.fromkeys(a.only):
        rows += measure(NETWORKS[name], a.batch)
    title = "Memory of a training step of networks with stages, predicted"
    lines = [cells([*of_network]) for _, of_network in groupby(rows, lambda row: row.network)]
    about = report.machine(torch.device("cpu"))
    print(about)
    show(title, HEADINGS, lines, LEFT)
    report.write(a, rows, report.markdown(title, about, [markdown_table(HEADINGS, lines, LEFT), EXPLANATION]))


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    listed = f"networks: {', '.join(NETWORKS)} (all)"
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NETWORK", help=listed)
    parser.add_argument("--batch", type=report.positive, help="batch size, samples (that of each network)")
    report.add_outputs(parser, figure=False)
    return parser.parse_args()


def measure(network: Network, batch: int | None = None) -> list[Row]:
    """A row for each way."""
    batch = batch or network.batch
    with torch.device("meta"):
        parameters = sum(p.nbytes for p in network.make("plain").parameters())
    sample = " x ".join(map(str, network.sample))
    rows = []
    for way in WAYS:
        peak = revflow.predict_memory(partial(step, network, way)).peak(batch)
        rows.append(Row(network.title, sample, batch, way, parameters, peak - 2 * parameters))
    return rows


def step(network: Network, way: Way, batch: int) -> None:
    """A forward and a backward pass of a new network, whose gradients exist before."""
    net = network.make(way)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    net(torch.randn(batch, *network.sample)).square().mean().backward()


EXPLANATION = """\
Each peak includes the input, but neither the parameters nor their gradients.

- plain: standard autograd
- checkpoint: PyTorch's checkpointing of every block
- reversible: revflow for the blocks between transitions, and stored activations of the transitions
- mixed: revflow for stages of two or more blocks, and checkpointing of the transitions and of single blocks
"""


def cells(rows: Sequence[Row]) -> tuple[str, ...]:
    """The line of a network."""
    first = rows[0]
    return (
        first.network,
        first.sample,
        str(first.batch),
        f"{2 * first.parameters / GIB:.2f}",
        *(f"{row.peak / GIB:.2f}" for row in rows),
    )


if __name__ == "__main__":
    main()
