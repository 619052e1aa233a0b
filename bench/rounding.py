"""Rounding errors in the gradients of a CrevNet that recomputes its activations in float32.

    python bench/rounding.py --markdown bench/results/rounding-cpu.md

The inputs are windows of the air-traffic days, cut to a square, which are mostly dark, a bright square that moves in the dark,
and uniform noise. For each, the benchmark compares the gradient of all parameters with standard autograd's in float64. It
reports the relative errors of standard autograd and of the engine, both in float32. In exact arithmetic it reports the engine's
difference from standard autograd on the same grid. The network is untrained, so no frame's gradients are small.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import h5py
import torch
from torch import Tensor

import revflow
from crevnet import CrevNet, make_network
from crevnet.networks.config import PRESETS, CrevNetConfig
from pages.report import machine, markdown, output, positive
from pages.tables import markdown_table, show

DAY = "Switzerland/Switzerland_training/20180801_100m_bins.h5"
STARTS = (100, 150, 180)
"""The windows' first slots."""
ABOUT = """\
Relative errors of the gradient of all parameters: of float32 against standard autograd in float64; in exact mode against
standard autograd on the same grid."""
HEADINGS = ("frames", "not dark", "standard autograd", "recomputed", "the guard", "recomputed, exact mode")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="paper", help="preset of CrevNet (paper)")
    parser.add_argument(
        "--data", type=Path, default=Path("tests/data/air-traffic"), help="folder of the air-traffic days (%(default)s)"
    )
    parser.add_argument("--size", type=positive, default=32, help="height and width of the frames, pixels (32)")
    parser.add_argument(
        "--windows", type=positive, default=len(STARTS), help="number of windows of the day, at most 3 (3)"
    )
    parser.add_argument("--markdown", type=output(".md"), help="Markdown file to write the table to")
    a = parser.parse_args()
    torch.set_num_threads(1)
    config = replace(PRESETS[a.preset], static=(), memory_budget="min")
    frames = windows(a.data / DAY, config, a.size, STARTS[: a.windows])
    rows = [(name, f"{(x > 0).float().mean():.1%}", *compare(config, x)) for name, x in frames]
    title = "Rounding in CrevNet's gradients"
    show(title, HEADINGS, rows, HEADINGS[:1])
    if a.markdown:
        about = (
            f"{machine(torch.device('cpu'))}; preset {a.preset}, {config.past} + {config.horizon} frames, batches of 1"
        )
        sections = ABOUT, markdown_table(HEADINGS, rows, HEADINGS[:1])
        a.markdown.write_text(markdown(title, about, sections), encoding="utf-8")


def windows(day: Path, config: CrevNetConfig, size: int, starts: tuple[int, ...]) -> Iterator[tuple[str, Tensor]]:
    """Names and frames (1, T, C, size, size) in [0, 1]."""
    count = config.past + config.horizon
    with h5py.File(day) as file:
        for start in starts:
            frames = torch.from_numpy(file["array"][start : start + count, 200 : 200 + size, 200 : 200 + size])
            yield f"aircraft, from slot {start}", frames.permute(0, 3, 1, 2)[None].float() / 255
    frames = torch.zeros(1, count, config.channels, size, size)
    for k in range(count):
        frames[0, k, :, k : k + size // 4, k : k + size // 4] = 1
    yield "a square in the dark", frames
    yield "uniform noise", torch.rand(1, count, config.channels, size, size, generator=torch.Generator().manual_seed(0))


def compare(config: CrevNetConfig, frames: Tensor) -> tuple[str, ...]:
    """The cells of a row."""
    network, exact = (make(replace(config, exact_bits=bits)) for bits in (None, 16))
    truth = plain(copy.deepcopy(network).double(), frames.double())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", revflow.ReconstructionWarning)
        recomputed = gradient(network, frames)
    warned = "warns" if caught else "silent"
    errors = relative(plain(network, frames), truth), relative(recomputed, truth)
    difference = relative(gradient(exact, frames), plain(exact, frames))
    return *(f"{error:.1e}" for error in errors), warned, f"{difference:.1e}"


def make(config: CrevNetConfig) -> CrevNet:
    torch.manual_seed(0)
    return make_network(config)  # type: ignore[return-value]


def gradient(network: CrevNet, frames: Tensor) -> Tensor:
    """The gradient of the training loss by all parameters, in float64."""
    found = torch.autograd.grad(network.loss(frames, None), [*network.parameters()])
    return torch.cat([g.double().flatten() for g in found])


def plain(network: CrevNet, frames: Tensor) -> Tensor:
    with revflow.ordinary_autograd():
        return gradient(network, frames)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


if __name__ == "__main__":
    main()
