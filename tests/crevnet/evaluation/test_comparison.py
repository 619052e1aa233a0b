"""Several runs in one table: each as if it were alone, on the same windows, and their mean."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from crevnet.data.files.days import open_days
from crevnet.data.maps.static import StaticInputs
from crevnet.networks.baselines.unet import UNetConfig
from crevnet.training.checkpoint_reading import load_network
from crevnet.training.trainer import train

UNET = UNetConfig(past=5, horizon=2, static=("clock", "road_map"), depth=2, width=2)


@pytest.fixture(scope="module")
def other(settings, tmp_path_factory):
    """A run of another model, of more past frames and with the clock; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "other"
    train(replace(settings, model=UNET), folder)
    return folder


def scores_of(crevnet, path, *arguments):
    crevnet("evaluate", *arguments, "--json", path)
    return json.loads(path.read_text())


@pytest.fixture
def direct(run, other, settings, points):
    """The forecasts of both runs for the windows of 7 frames of the validation days, and the truth: by city, clipped nowhere."""
    shorter, longer = load_network(run, settings.model, "best").eval(), load_network(other, UNET, "best").eval()
    results = {}
    for city, training, validation in (("Here", (0, 1), 2), ("There", (3,), 4)):
        roads = torch.from_numpy(np.concatenate([points(s) for s in training]).any(-1).mean(0).astype(np.float32))[None]
        clock = StaticInputs(("clock",), {})
        day = next(d for d in open_days(settings.data.root, "validation") if d.city == city)
        frames = torch.from_numpy(points(validation).transpose(0, 3, 1, 2) / np.float32(255))
        forecasts, truths = [], []
        for start in (0, 7):
            past, seen = frames[start : start + 5][None], torch.cat((clock(day, start), roads))
            forecasts.append([shorter.generate(past[:, 2:], roads[None])[0], longer.generate(past, seen[None])[0]])
            truths.append(frames[start + 5 : start + 7])
        results[city] = (forecasts, truths)
    return results


def mse(forecasts, truths):
    errors = [(f.clamp(0, 1) - t).square().mean().item() for f, t in zip(forecasts, truths, strict=True)]
    return np.mean(errors)


def test_each_run_s_scores_and_the_ensemble_s(run, other, direct, crevnet, tmp_path):
    found = scores_of(crevnet, tmp_path / "scores.json", run, other, "--ensemble")
    names = [f"CrevNet, {run}", f"U-Net, {other}", "mean of the runs"]
    assert found["windows"] == 4 and list(found["Here"])[:4] == [*names, "zeros"]
    for city, (forecasts, truths) in direct.items():
        one, two = zip(*forecasts, strict=True)
        both = [(a + b) / 2 for a, b in forecasts]
        for name, those in zip(names, (one, two, both), strict=True):
            assert found[city][name]["mse"] == pytest.approx(mse(those, truths), rel=1e-5), (city, name)


def test_without_an_ensemble_there_is_none(run, other, crevnet, tmp_path):
    found = scores_of(crevnet, tmp_path / "scores.json", other, run)
    assert list(found["There"])[:3] == [f"U-Net, {other}", f"CrevNet, {run}", "zeros"]


def test_clock_of_a_model_that_sees_fewer_frames_is_that_of_its_own_window(settings, other, crevnet, tmp_path):
    """Its figures are the same alone, on windows that begin later, and beside a model of more frames."""
    short = tmp_path / "short"
    model = replace(settings.model, past=3, static=("clock",), blocks=(1,), strides=(1,), modules=1)
    train(replace(settings, model=model), short)
    both = scores_of(crevnet, tmp_path / "both.json", short, other)
    alone = scores_of(
        crevnet, tmp_path / "alone.json", short, "--data.validation_slots=[2,20]", "--data.validation_stride=7"
    )
    assert both["windows"] == alone["windows"] == 4
    assert both["Here"][f"CrevNet, {short}"]["mse"] == pytest.approx(alone["Here"]["CrevNet"]["mse"], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("RUN", "RUN"), "named twice"),
        (("RUN", "--ensemble"), "--ensemble is the mean of several runs"),
        (("RUN", "OTHER", "--feedback", "frame"), "--feedback frame is only for CrevNet, but OTHER is a run of U-Net"),
        (("RUN", "absent"), "absent"),
    ],
)
def test_comparisons_that_cannot_be(options, named, run, other, failing):
    folders = {"RUN": run, "OTHER": other}
    line = failing("evaluate", *(folders.get(option, option) for option in options))
    assert named.replace("OTHER", str(other)) in line


@pytest.mark.parametrize(
    ("option", "change"),
    [
        ("cities", ("cities: null", "cities: [There]")),
        ("training_slots", ("training_slots: null", "training_slots: [0, 9]")),
    ],
)
def test_runs_of_different_data(option, change, run, other, failing, crevnet, tmp_path):
    copy = shutil.copytree(other, tmp_path / "copy")
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace(*change))
    line = failing("evaluate", run, copy)
    assert f"data.{option}" in line and str(run) in line and str(copy) in line
    if option == "cities":  # it is told which to take
        found = scores_of(crevnet, tmp_path / "scores.json", run, copy, "--data.cities=[Here]")
        assert "Here" in found and "There" not in found


def test_runs_that_predict_other_frames(run, settings, failing, tmp_path):
    train(replace(settings, model=replace(UNET, horizon=3)), tmp_path / "run")
    line = failing("evaluate", run, tmp_path / "run")
    assert f"{tmp_path / 'run'} predicts 3 frames of 3 channels, but {run} predicts 2 of 3" in line


def test_how_a_run_reads_its_data_makes_no_difference(run, other, crevnet, tmp_path):
    copy = shutil.copytree(other, tmp_path / "copy")
    config = copy / "config.yaml"
    config.write_text(
        config.read_text().replace("batch_size: 4", "batch_size: 3").replace("  stride: 1", "  stride: 2")
    )
    assert scores_of(crevnet, tmp_path / "scores.json", run, copy)["windows"] == 4
