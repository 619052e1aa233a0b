"""examples/video_clip.py: the clip is what the package ships, and its last frame is scored as computed by hand."""

import json

import h5py
import numpy as np
import pytest
import torch

import video_clip


@pytest.fixture(autouse=True)
def a_cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("CREVNET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)


def test_the_clip_is_decoded():
    frames = video_clip.decoded(video_clip.clip(), 144, 176)
    assert frames.shape == (120, 144, 176, 3) and frames.dtype == np.uint8
    # The frames follow one another, and a man with a red bow tie in front of a bright window is in them.
    values = frames / 255
    differences = np.square(np.diff(values, axis=0)).mean((1, 2, 3))
    assert differences.min() > 1e-5 and differences.max() < 0.02
    tie = values[0, 105:115, 85:100].mean((0, 1))
    assert tie[0] > 1.5 * tie[1] and values[0, 30:60, 150:].mean() > 0.6


def test_smaller_frames_are_the_same_picture():
    large, small = (video_clip.decoded(video_clip.clip(), *size) for size in ((144, 176), (72, 88)))
    means = large.reshape(120, 72, 2, 88, 2, 3).mean((2, 4))
    assert np.abs(means - small).mean() < 3


def test_it_trains_scores_and_draws(tmp_path, capsys):
    out = tmp_path / "clip"
    video_clip.main(["--steps=1", "--height=18", "--width=22", f"--out={out}"])
    said = capsys.readouterr().out
    assert "last frame" in said and "zeros" in said
    with h5py.File(out / "movie" / "carphone.h5") as file:
        truth = file["array"][:24] / 255
    starts = range(24 - 6 + 1)
    errors = np.array([truth[s + 4 : s + 6] - truth[s + 3] for s in starts])
    zeros = np.array([truth[s + 4 : s + 6] for s in starts])
    scores = json.loads((out / "scores.json").read_text())["movie"]
    assert scores["last frame"]["mse"] == pytest.approx(np.square(errors).mean(), rel=1e-5)
    assert scores["zeros"]["mse"] == pytest.approx(np.square(zeros).mean(), rel=1e-5)
    assert [*out.glob("*.png")] and [*out.glob("*.gif")]


def test_a_folder_that_is_there_is_left_alone(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        video_clip.main([f"--out={tmp_path}"])
    assert stop.value.code == 2 and "exists: name another folder" in capsys.readouterr().err
