"""Errors of the input frame that eq. 5 of the paper recovers from a trained CrevNet's predicted frame.

    python bench/equation5.py demo/run

For float32 and float64: the largest error of the recovered frame, in [0, 1], over the past frames of the first validation
window, and the smallest 1 - g of all gates, by which the inverse divides.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from crevnet import CrevNet, ReversiblePredictiveModule
from crevnet.data.city_data import CityData
from crevnet.training.checkpoint_reading import load_network
from crevnet.training.settings import RunSettings, load_settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder that `crevnet fit` wrote")
    run = parser.parse_args().run
    settings = load_settings(run)
    network = load_network(run, settings.model, "best")
    if not isinstance(network, CrevNet):
        parser.error(f"{run} is a run of {settings.model.title}: only CrevNet has eq. 5")
    for dtype in (torch.float32, torch.float64):
        error, rest = recovery_error(network.to(dtype), settings)
        print(f"{dtype}: largest error {error:.1e}, smallest 1 - g {rest:.4f}")


@torch.no_grad()
def recovery_error(network: CrevNet, settings: RunSettings) -> tuple[float, float]:
    """The largest error of a recovered frame, and the smallest 1 - g of its inverse."""
    batch = next(iter(CityData(settings.data, settings.model).validation_batches()))
    frames = network.padded(batch["frames"], batch["static"] if settings.model.static else None)
    frames = frames.to(next(network.parameters()).dtype)
    smallest = []
    for module in network.modules():
        if isinstance(module, ReversiblePredictiveModule):
            module.attention.register_forward_hook(lambda *call: smallest.append(torch.sigmoid(-call[2]).min().item()))
    past = frames[:, : settings.model.past]
    rebuilt = zip(network.rebuilt(past), past.unbind(1)[1:], strict=True)
    largest = max((found - frame).abs().max().item() for found, frame in rebuilt)
    return largest, min(smallest)


if __name__ == "__main__":
    main()
