"""For the tests of submissions: networks that predict what is easily computed, and what they predict, by numpy."""

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import torch

from crevnet.data.settings import DataSettings
from crevnet.networks.config import PRESETS, CrevNetConfig
from crevnet.training.settings import RunSettings

PAST = 3
"""Frames that the networks see, of the 12 that are given."""


class FakeNetwork(torch.nn.Module):
    """Predicts `factor` times the frames that it saw, the last one first; keeps the static inputs that it was given."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor, self.static = factor, []
        self.config = CrevNetConfig()

    def check_generation(self, height, width):
        pass

    def generate(self, past, static=None, horizon=None, feedback="latent"):
        self.static.append(static)
        assert past.shape[1] == PAST
        return torch.stack([self.factor * past[:, -1 - k % PAST] for k in range(horizon)], 1)


def predicted(past, factor, horizons):
    """The same of (12, H, W, C) values 0..255, not rounded."""
    return np.stack([factor * past[-1 - (h - 1) % PAST].astype(np.float64) for h in horizons])


def fake_runs(folder: Path, monkeypatch, factors: list[float], names: list[str] | None = None, **model) -> list[Path]:
    """Folders of runs, each with a FakeNetwork."""
    runs = [folder / name for name in names or [f"run-{factor}" for factor in factors]]
    networks = {run: FakeNetwork(factor) for run, factor in zip(runs, factors, strict=True)}
    for run in runs:
        config = replace(PRESETS["tiny"], **{"past": PAST, "static": (), **model})
        RunSettings(config, DataSettings()).save(run)
        (run / "checkpoints").mkdir()
        (run / "checkpoints" / "best.ckpt").write_text(run.name)
    monkeypatch.setattr("crevnet.traffic4cast.forecasting.load_network", lambda run, *_: networks[run])
    return runs


def rounded(values):
    return np.rint(np.clip(values, 0, 255)).astype(np.uint8)


def array(path):
    with h5py.File(path) as file:
        return file["array"][()]


def write_array(path, values, name="array"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.create_dataset(name, data=values)


def scores(predictions, truths, first_slots, horizons, slots_a_day, unit):
    """What `crevnet score` says of a city: lists of (P, H, W, C), and the first predicted slot of each."""
    errors = np.square(np.array(predictions, np.float64) - np.array(truths, np.float64)) * unit
    hours = (np.array(first_slots)[:, None] + np.array(horizons) - 1) * 24 // slots_a_day
    return {
        "mse": errors.mean(),
        "mse_by_channel": errors.mean((0, 1, 2, 3)).tolist(),
        "mse_by_horizon": errors.mean((0, 2, 3, 4)).tolist(),
        "mse_by_hour": {str(hour): errors[hours == hour].mean() for hour in np.unique(hours)},
    }
