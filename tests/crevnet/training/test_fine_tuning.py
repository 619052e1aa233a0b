"""Training that begins with another run's weights, and on one future frame alone."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from crevnet import CrevNet
from crevnet.training.checkpoint_reading import load_checkpoint, load_network
from crevnet.training.settings import load_settings
from crevnet.training.trainer import train


@pytest.fixture(scope="module")
def one_window(settings):
    """A run of one step on a single window, on which it is validated too."""
    slots = {"training_slots": (2, 7), "validation_slots": (2, 7), "validation_split": "training"}
    return replace(settings, data=replace(settings.data, cities=["There"], **slots))


@pytest.fixture(scope="module")
def window(points):
    array = points(3)[2:7]
    frames = torch.from_numpy(array.transpose(0, 3, 1, 2) / np.float32(255))[None]
    return frames, torch.from_numpy(array.any(-1).mean(0, dtype=np.float64).astype(np.float32))[None, None]


@pytest.fixture(scope="module")
def tuned(one_window, run, tmp_path_factory):
    """Fine-tuned from `run` on the second future frame."""
    folder = tmp_path_factory.mktemp("tuned")
    training = replace(one_window.training, start=run, loss=2, learning_rate=1e-4)
    return folder, train(replace(one_window, training=training), folder)


def test_it_goes_on_from_the_best_weights_with_the_loss_of_one_frame(tuned, one_window, window, run):
    folder, _ = tuned
    network = load_network(run, one_window.model, "best")
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
    frames, roads = window
    predictions = network(frames, roads)
    (predictions[:, 3] - frames[:, 4]).square().mean().backward()  # of the frame after the fourth, from true ones
    optimizer.step()
    found = load_network(folder, one_window.model, "last").state_dict()
    for name, value in network.state_dict().items():
        assert (found[name] - value).abs().max() < 1e-6, name
    assert load_settings(folder).training.start == run


def test_checkpoints_are_compared_by_that_frame(tuned, one_window, window):
    folder, score = tuned
    frames, roads = window
    forecast = load_network(folder, one_window.model, "best").generate(frames[:, :3], roads).clamp(0, 1)
    errors = (forecast - frames[:, 3:]).square().mean((0, 2, 3, 4))
    assert score == pytest.approx(errors[1].item(), rel=1e-5) and errors[0] != errors[1]


def test_a_run_on_one_frame_is_resumed_by_the_command_line(tuned, crevnet, tmp_path):
    run = shutil.copytree(tuned[0], tmp_path / "run")
    assert "best validation MSE" in crevnet("fit", "--resume", run, "--training.epochs", "2")


def test_a_resumed_run_goes_on_with_its_own_weights(tuned, one_window, run, tmp_path, monkeypatch):
    training = replace(one_window.training, start=run, loss=2, learning_rate=1e-4)
    for epochs in (1, 2):
        train(replace(one_window, training=replace(training, epochs=epochs)), tmp_path / "parted", resume=epochs > 1)
    train(replace(one_window, training=replace(training, epochs=2)), tmp_path / "whole")
    parted, whole = (load_network(tmp_path / f, one_window.model, "last").state_dict() for f in ("parted", "whole"))
    assert all(torch.equal(parted[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--training.start", "absent"), "absent"),
        (("--training.start", "RUN", "--model.modules=3"), "another architecture"),
        (("--training.loss", "3"), "one future frame, 1 to 2; got 3"),
        (("--training.loss", "0"), "one future frame, 1 to 2; got 0"),
    ],
)
def test_what_cannot_be(options, named, small, cities, run, failing, tmp_path):
    options = [str(run) if option == "RUN" else option for option in options]
    assert named in failing("fit", *small, "--data.root", cities, "--out", tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", [{"loss": 2}, {"loss": "future"}])
def test_another_score_chooses_the_best_checkpoint_anew(change, one_window, tmp_path, monkeypatch):
    """The second epoch's score is worse than the first's, which counts if both are of the same frames."""
    found = iter((0.1, 0.2))
    monkeypatch.setattr(CrevNet, "scores", lambda *_: torch.tensor([next(found)]))
    train(one_window, tmp_path)
    training = replace(one_window.training, epochs=2, **change)
    best = train(replace(one_window, training=training), tmp_path, resume=True)
    assert best == pytest.approx(0.2 if change["loss"] == 2 else 0.1)
    epochs = load_checkpoint(tmp_path, "best")["epoch"]
    assert epochs == (1 if change["loss"] == 2 else 0)


@pytest.mark.parametrize("option", ["--out=elsewhere", "--preset=tiny", "--protocol=2019", "--training.start=absent"])
def test_a_run_that_has_begun_does_not_begin_otherwise(option, run, failing):
    assert f"{option.partition('=')[0]} is for new runs" in failing("fit", "--resume", run, option)
