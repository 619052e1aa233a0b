"""bench/training_step.py on the smallest preset: its report against the same step written out."""

import re
import sys

import h5py
import numpy as np
import pytest
import torch

import training_step
from crevnet import PRESETS, CrevNet

START, SEED = 2, 3


@pytest.fixture(scope="module")
def day(tmp_path_factory):
    """A day of 16 slots of 19 x 14 pixels, its folder and its array."""
    root = tmp_path_factory.mktemp("data")
    array = np.random.default_rng(0).integers(0, 256, (16, 19, 14, 3)).astype(np.uint8)
    array[np.random.default_rng(1).random(array.shape[:3]) < 0.7] = 0
    path = root / "Here" / "Here_training" / "20180101_100m_bins.h5"
    path.parent.mkdir(parents=True)
    with h5py.File(path, "w") as file:
        file["array"] = array
    return root, array


@pytest.fixture(scope="module")
def report(day):
    return training_step.run("tiny", day[0], "Here", START, SEED)


def value(report, name):
    return re.search(rf"^- {re.escape(name)}: (.*)$", report, re.MULTILINE).group(1)


def test_loss_is_that_of_the_first_step(report, day):
    array, config = day[1], PRESETS["tiny"]
    frames = array[START : START + config.window].transpose(0, 3, 1, 2) / np.float32(255)
    roads = array.any(-1).mean(0).astype(np.float32)
    torch.manual_seed(SEED)
    model = CrevNet(config)
    loss = model.loss(torch.from_numpy(frames)[None], torch.from_numpy(roads)[None, None]).item()
    assert float(value(report, "loss").split()[0]) == pytest.approx(loss, abs=1e-6)
    assert value(report, "parameters") == f"{sum(p.numel() for p in model.parameters()):,}"


def test_report_says_what_was_run(report):
    assert report.startswith("# One training step\n")
    tiny = PRESETS["tiny"]
    assert value(report, "preset") == f"tiny, {3 * sum(tiny.blocks)} layers, {tiny.modules} modules, float32"
    frames = f"{tiny.past} -> {tiny.horizon} frames of 19 x 14"
    assert value(report, "window") == f"{frames}, batch 1, slots from 2 of Here"
    assert f"torch {torch.__version__}" in value(report, "versions")


def test_peak_counts_parameters_gradients_and_optimizer(report, day, monkeypatch):
    """Weights, gradients and Adam's two moments are four copies of the parameters; what else there is, is more."""
    seen = []
    measure = training_step.revflow.measure_memory

    def record(step):
        seen.append(measure(step))
        return seen[-1]

    monkeypatch.setattr(training_step.revflow, "measure_memory", record)
    again = training_step.run("tiny", day[0], "Here", START, SEED)
    copies = 4 * sum(p.numel() for p in CrevNet(PRESETS["tiny"]).parameters()) * 4
    assert copies < seen[0].peak < 3 * copies
    assert value(again, "peak of live tensors").startswith(f"{seen[0].peak / 2**30:.2f} GiB")
    assert value(again, "loss") == value(report, "loss")


def test_command_prints_and_writes_the_report(day, tmp_path, monkeypatch, capsys):
    out = tmp_path / "report.md"
    options = ["--preset", "tiny", "--data", str(day[0]), "--city", "Here", "--start", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["bench/training_step.py", *options])
    training_step.main()
    assert capsys.readouterr().out == out.read_text()
    assert value(out.read_text(), "command") == " ".join(["python", "bench/training_step.py", *options])
