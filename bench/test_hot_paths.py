"""The engine's hot paths, each against standard autograd with the same parameters: `make bench` runs them.

    OMP_NUM_THREADS=1 pytest bench/test_hot_paths.py --benchmark-enable --benchmark-json hot-paths.json
    python bench/regressions.py hot-paths.json

What pytest-benchmark times is the engine. Before each of its rounds the same is done without the engine, and timed too: the two
alternate, so that whatever slows the machine slows both. The ratios of the rounds go into the JSON, for bench/regressions.py.
Times are the process's own, of one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import revflow
from crevnet import PRESETS
from crevnet.networks.crevnet.autoencoder import Latent
from crevnet.networks.crevnet.predictor import Predictor
from exact import additive, gated

ROUNDS, WARM_UP = 100, 5


class HotPath(NamedTuple):
    """The same work with the engine and without."""

    engine: Callable[[], object]
    plain: Callable[[], object]


def training(blocks: list[nn.Module], x: Tensor, guard: str = "off", exact: bool = False) -> HotPath:
    """A training step of a chain."""
    net = revflow.ReversibleSequence(blocks, guard=guard, exact=exact)

    def step(forward: Callable[[Tensor], Tensor]) -> None:
        net.zero_grad()
        forward(x).square().mean().backward()

    return HotPath(lambda: step(net), lambda: step(net.plain))


def tiny(*drawing: nn.Module) -> list[nn.Module]:
    """Conditioners that take so little time that the engine's own shows."""
    return [
        revflow.AdditiveCoupling(nn.Sequential(nn.Linear(8, 8), nn.SiLU(), *drawing, nn.Linear(8, 8)))
        for _ in range(16)
    ]


def rows() -> Tensor:
    return torch.randn(256, 16)


def images() -> Tensor:
    return torch.randn(1, 128, 16, 16)


def inverse() -> HotPath:
    """Without a graph; ordinary modules know no inverse, but the forward pass is as much work. A longer chain, which takes as
    long as the others' training steps."""
    net = revflow.ReversibleSequence([block for _ in range(4) for block in tiny()])
    x = rows()

    def no_grad(function: Callable[[Tensor], Tensor]) -> None:
        with torch.no_grad():
            function(x)

    return HotPath(lambda: no_grad(net.inverse), lambda: no_grad(net.plain))


def recurrence() -> HotPath:
    """A training step of CrevNet's predictor, over two time steps."""
    predictor = Predictor(PRESETS["tiny"])
    channels = PRESETS["tiny"].widths[-1]
    latent: Latent = (torch.randn(1, channels, 8, 8), torch.randn(1, channels, 8, 8))

    def step() -> None:
        predictor.zero_grad()
        out, state = latent, predictor.initial_state(latent)
        for _ in range(2):
            out, state = predictor(out, state)
        torch.cat(out).square().mean().backward()

    def plain() -> None:
        with revflow.ordinary_autograd():
            step()

    return HotPath(step, plain)


HOT_PATHS: dict[str, Callable[[], HotPath]] = {
    "tiny additive blocks": lambda: training(tiny(), rows()),
    "tiny additive blocks, guarded": lambda: training(tiny(), rows(), guard="warn"),
    "tiny additive blocks that draw": lambda: training(tiny(nn.Dropout(0.1)), rows()),
    "convolutions of 64 channels": lambda: training([additive(64) for _ in range(4)], images()),
    "gated convolutions": lambda: training([gated(64) for _ in range(4)], images()),
    "exact convolutions": lambda: training([additive(64) for _ in range(4)], images(), exact=True),
    "inverse": inverse,
    "recurrence": recurrence,
}


@pytest.mark.benchmark(timer=time.process_time, disable_gc=True)
@pytest.mark.parametrize("name", HOT_PATHS)
def test_hot_path(name: str, benchmark) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    path = HOT_PATHS[name]()
    plain: list[float] = []

    def run_plain() -> None:
        began = time.process_time()
        path.plain()
        plain.append(time.process_time() - began)

    benchmark.group = name
    benchmark.pedantic(path.engine, setup=run_plain, rounds=ROUNDS, warmup_rounds=WARM_UP)
    if benchmark.enabled:
        pairs = zip(benchmark.stats.stats.data, plain[WARM_UP:], strict=True)
        benchmark.extra_info["ratios"] = [engine / without for engine, without in pairs]
