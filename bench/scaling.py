"""Peak memory per process in training steps of CrevNet on several processes, by strategy, in copies of the parameters.

    python bench/scaling.py --markdown bench/results/scaling-memory-cpu.md

Processes communicate over gloo on this machine. The network has wide predictive modules and small frames, so that parameters,
gradients, Adam's state and buffers for communication dominate. The peak is the process's resident memory (ru_maxrss), without
that from before the network is made. Linux only.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from crevnet import CrevNet, CrevNetConfig
from crevnet.training.task import FusedAdam
from pages.report import machine, markdown, output
from pages.tables import markdown_table

STRATEGIES = ("alone", "ddp", "fsdp")
HEADINGS = ("strategy", "processes", "peak, copies of the parameters")


class _Loss(torch.nn.Module):
    """A network whose forward is its loss, as DDP requires."""

    def __init__(self, network: CrevNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, frames: Tensor) -> Tensor:
        return self.network.loss(frames)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4], help="numbers of processes (2 4)")
    parser.add_argument("--stages", type=int, default=3, help="number of downsamplings, each with 4× the channels (3)")
    parser.add_argument("--markdown", type=output(".md"), help="Markdown file to write the table to")
    arguments = parser.parse_args()
    config = CrevNetConfig(
        blocks=(1,) * arguments.stages,
        strides=(2,) * arguments.stages,
        modules=2,
        channels=4,
        static=(),
        past=2,
        horizon=1,
        memory_budget="min",
    )
    cases = [("alone", 1), *((strategy, count) for strategy in STRATEGIES[1:] for count in arguments.processes)]
    table = markdown_table(HEADINGS, [(s, str(n), f"{peak(s, n, config):.2f}") for s, n in cases], ("strategy",))
    with torch.device("meta"):
        size = sum(p.numel() for p in CrevNet(config).parameters())
    about = f"{machine(torch.device('cpu'))}; {size:,} parameters in float32, a copy is {4 * size / 2**20:.0f} MiB"
    page = markdown("Memory of training in several processes, in copies of the parameters", about, [table])
    print(page)
    if arguments.markdown:
        arguments.markdown.write_text(page, encoding="utf-8")


def peak(strategy: str, processes: int, config: CrevNetConfig) -> float:
    """The largest of the processes, in copies of the parameters."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_train, (strategy, processes, config, Path(folder)), nprocs=processes)
        return max(float(path.read_text()) for path in Path(folder).glob("peak-*"))


def _train(rank: int, strategy: str, processes: int, config: CrevNetConfig, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=(folder / "meet").as_uri(), rank=rank, world_size=processes)
    torch.manual_seed(0)
    before = resident()
    network = CrevNet(config)
    copy = sum(p.numel() for p in network.parameters()) * 4
    loss = network.loss
    if strategy == "ddp":
        loss = DistributedDataParallel(_Loss(network), gradient_as_bucket_view=True)
    elif strategy == "fsdp":
        fully_shard(network)
        register_fsdp_forward_method(network, "loss")
        loss = network.loss
    optimizer = FusedAdam(network.parameters(), 1e-4)
    for _ in range(3):
        loss(torch.rand(1, 3, 4, 32, 32)).backward()
        optimizer.step()
        optimizer.zero_grad()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (folder / f"peak-{rank}").write_text(str((peak - before) / copy))
    dist.destroy_process_group()


def resident() -> int:
    """Bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    main()
