"""examples/moving_mnist.py: the movies, the network and the scores are what it says."""

import json

import h5py
import numpy as np
import pytest
import torch

import moving_mnist
from crevnet.training.settings import load_settings


@pytest.fixture(autouse=True)
def a_cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("CREVNET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)


def test_it_trains_scores_and_draws(tmp_path, capsys):
    out = tmp_path / "mnist"
    moving_mnist.main(["--steps=1", "--movies=2", "--validation=1", f"--out={out}"])
    assert "summed" in capsys.readouterr().out
    model = load_settings(out / "run").model
    assert (model.clip, model.past, model.horizon, model.blocks, model.modules) == (3, 10, 10, (1, 1, 1), 2)
    (movie,) = (out / "movies" / "validation").glob("*.h5")
    with h5py.File(movie) as file:
        frames = file["array"][:] / 255
    assert frames.shape == (20, 64, 64, 1)
    scores = json.loads((out / "scores.json").read_text())["movies"]
    summed = np.square(frames[10:] - frames[9]).sum((1, 2, 3)).mean()
    assert scores["last frame"]["mse_summed"] == pytest.approx(summed, rel=1e-5)
    assert [*out.glob("*.png")] and [*out.glob("*.gif")]


def test_a_folder_that_is_there_is_left_alone(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        moving_mnist.main([f"--out={tmp_path}"])
    assert stop.value.code == 2 and "exists: name another folder" in capsys.readouterr().err
