"""For the tests of submissions: small full days, networks that predict what is easily computed, and scores by numpy."""

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import torch

from crevnet import CrevNetConfig
from crevnet.config import PRESETS
from crevnet.settings import DataSettings, RunSettings

SLOTS = (16, 34)
"""First predicted slots of a test day of 40 slots, for 2019."""


class FakeNetwork(torch.nn.Module):
    """Predicts `function(past, horizon)`, and keeps the static inputs that it was given."""

    def __init__(self, function):
        super().__init__()
        self.function, self.static = function, []

    def generate(self, past, static=None, horizon=None, feedback="latent"):
        self.static.append(static)
        return self.function(past, horizon)


def last_frame(past, horizon):
    return past[:, -1:].expand(-1, horizon, -1, -1, -1)


def later(past, horizon):
    """One horizon as unlike another as a frame seen."""
    return torch.stack([past[:, -1 - k % past.shape[1]] * 0.5 + 0.001 * k for k in range(horizon)], 1)


def fake_run(folder: Path, monkeypatch, function, **model) -> FakeNetwork:
    """A run's folder whose network is a FakeNetwork."""
    config = replace(PRESETS["tiny"], **{"past": 3, "static": (), **model})
    RunSettings(config, DataSettings()).save(folder)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "best.ckpt").write_text(folder.name)
    network = FakeNetwork(function)

    def load(run: Path, model: CrevNetConfig, which: str, before=_load()):
        return network if run == folder else before(run, model, which)

    monkeypatch.setattr("crevnet.competition.forecasting.load_network", load)
    return network


def _load():
    from crevnet.competition import forecasting

    return forecasting.load_network


def array(path):
    with h5py.File(path) as file:
        return file["array"][()]


def rounded(values):
    return np.rint(np.clip(values, 0, 255)).astype(np.uint8)
