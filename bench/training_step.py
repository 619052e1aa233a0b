"""One full training step of CrevNet (forward, backward, Adam) on a window of a day file: loss, time and peak memory.

    python bench/training_step.py --preset paper --data tests/data/air-traffic --city Switzerland --start 60

Prints a Markdown report; `--out FILE` writes it. On the CPU the peak counts every live tensor, with parameters, gradients and
optimizer state. The report also has the process's peak resident memory.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

import revflow
from crevnet import PRESETS, CrevNet
from crevnet.data.files.days import open_days
from crevnet.data.maps.road_map import road_map
from crevnet.data.windows import Windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="paper", help="preset of CrevNet (paper)")
    parser.add_argument("--data", type=Path, required=True, help="folder in Traffic4cast's layout")
    parser.add_argument("--city", required=True, help="city, whose first training day has the window")
    parser.add_argument("--start", type=int, default=60, help="first time step of the window (60)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (0)")
    parser.add_argument("--out", type=Path, help="Markdown file to write the report to")
    arguments = parser.parse_args()
    report = run(arguments.preset, arguments.data, arguments.city, arguments.start, arguments.seed)
    print(report)
    if arguments.out:
        arguments.out.write_text(report + "\n", encoding="utf-8")


def run(preset: str, data: Path, city: str, start: int, seed: int) -> str:
    config = replace(PRESETS[preset], memory_budget="min")
    days = open_days(data, cities=[city])
    window = Windows(days[:1], config.window, starts=[start])[0]["frames"][None]
    roads = road_map(days)[None]
    losses = []

    def step() -> CrevNet:
        torch.manual_seed(seed)
        model = CrevNet(config)
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)
        loss = model.loss(window, roads)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        return model

    began = time.perf_counter()
    memory = revflow.measure_memory(step)
    seconds = time.perf_counter() - began
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    height, width = window.shape[-2:]
    rows = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads, CPU only",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
        "preset": f"{preset}, {sum(3 * b for b in config.blocks)} layers, {config.modules} modules, float32",
        "window": f"{config.past} -> {config.horizon} frames of {height} x {width}, batch 1, slots from {start} of {city}",
        "parameters": f"{sum(p.numel() for p in CrevNet(config).parameters()):,}",
        "loss": f"{losses[0]:.6f} (MSE of all one-step predictions, first step, seed {seed})",
        "peak of live tensors": f"{memory.peak / 2**30:.2f} GiB, parameters, gradients and Adam included ({memory.how})",
        "peak resident memory of the process": f"{resident:.2f} GiB",
        "time": f"{seconds / 60:.1f} min",
    }
    return "\n".join(["# One training step", "", *(f"- {name}: {value}" for name, value in rows.items())])


if __name__ == "__main__":
    main()
