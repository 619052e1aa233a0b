"""Scheduled sampling: which frames are true, what the model then sees, and that a resumed run draws the same."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from baseline_nets import TINY

from crevnet import MODELS, CrevNet, CrevNetConfig, make_network
from crevnet.training.scheduled_sampling import fed_frames
from crevnet.training.trainer import train

RECURRENT = ["convlstm", "predrnn", "predrnnpp", "prednet"]


@pytest.mark.parametrize(("step", "probability"), [(0, 1), (250, 0.75), (500, 0.5), (990, 0.01), (1000, 0), (2000, 0)])
def test_probability_falls_linearly(step, probability):
    found = np.array([fed_frames(4, 1000, step, seed) for seed in range(1000)])
    assert found.shape == (1000, 4)
    np.testing.assert_allclose(found.mean(0), probability, atol=0.06 if 0 < probability < 1 else 0)
    if probability == 0.5:
        np.testing.assert_allclose(np.corrcoef(found.T), np.eye(4), atol=0.12)  # each frame by itself


def test_draws_follow_from_the_seed_and_the_step():
    draws = [fed_frames(20, 1000, 500, 3), fed_frames(20, 1000, 501, 3), fed_frames(20, 1000, 500, 4)]
    assert fed_frames(20, 1000, 500, 3) == draws[0]
    assert draws[0] != draws[1] and draws[0] != draws[2]
    assert fed_frames(2, 0, 0, 3) == [False, False]


def tiny(name):
    torch.manual_seed(0)
    config = {"channels": 2, "static": ("road_map",), "past": 2, "horizon": 3}
    if name == "crevnet":
        return CrevNet(CrevNetConfig(**config, blocks=(1,), strides=(1,), modules=2)).double()
    return make_network(MODELS[name].config(**TINY[name], **config)).double()


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize("fed", [[True, True], [False, False], [True, False], [False, True]])
def test_loss_where_predictions_are_fed(name, fed):
    """By `forward`, on a window in which a frame that is not fed is replaced by its prediction."""
    network = tiny(name)
    frames, roads = torch.rand(2, 5, 2, 6, 5).double(), torch.rand(2, 1, 6, 5).double()
    seen = frames[:, :4].clone()
    with torch.no_grad():
        for t, true in zip((2, 3), fed, strict=True):
            if not true:
                seen[:, t] = network(seen[:, :t], roads)[:, -1]
    expected = (network(seen, roads) - frames[:, 1:]).square().mean()
    torch.testing.assert_close(network.loss(frames, roads, fed=fed), expected)


def test_crevnet_is_fed_latents():
    """As `generate` predicts from there on, in latent space, and not from what is decoded."""
    network = tiny("crevnet")
    frames, roads = torch.rand(2, 5, 2, 6, 5).double(), torch.rand(2, 1, 6, 5).double()
    with torch.no_grad():
        whole = network(frames[:, :4], roads)
        true_after_two = network.generate(frames[:, :3], roads, 2)  # frame 2 is fed, and frame 3 is not
        predictions = torch.cat((whole[:, :3], true_after_two[:, 1:]), 1)
    expected = (predictions - frames[:, 1:]).square().mean()
    torch.testing.assert_close(network.loss(frames, roads, fed=[True, False]), expected)


@pytest.mark.parametrize("name", ["crevnet", *RECURRENT])
def test_gradients_pass_through_predictions_that_are_fed(name):
    """By finite differences, along one direction a tensor."""
    network = tiny(name)
    frames, roads = torch.rand(1, 5, 2, 6, 5).double(), torch.rand(1, 1, 6, 5).double()

    def loss():
        return network.loss(frames, roads, "future", [False, True])

    loss().backward()
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            direction = torch.randn_like(parameter)
            values = [(parameter.add_(direction, alpha=by), loss().item())[1] for by in (1e-6, -2e-6)]
            parameter.add_(direction, alpha=1e-6)
            slope = (values[0] - values[1]) / 2e-6
            found = 0 if parameter.grad is None else (parameter.grad * direction).sum().item()
            assert found == pytest.approx(slope, rel=1e-3, abs=1e-8), key


@pytest.mark.parametrize("name", ["crevnet", "convlstm", "unet"])
def test_entries_that_cannot_be(name):
    network = tiny(name)
    message = "feeds nothing back" if name == "unet" else "fed has to have 2 entries for 5 frames; got 3"
    with pytest.raises(ValueError, match=message):
        network.loss(torch.rand(1, 5, 2, 6, 5).double(), torch.rand(1, 1, 6, 5).double(), fed=[True] * 3)


def test_a_resumed_run_feeds_what_the_uninterrupted_one_does(settings, tmp_path, monkeypatch):
    model = replace(settings.model, past=2, horizon=7)
    seen, loss = [], CrevNet.loss
    monkeypatch.setattr(CrevNet, "loss", lambda *arguments: seen.append(arguments[-1]) or loss(*arguments))

    def fed(folder, *epochs):
        """What is fed in a run of so many epochs of two steps, resumed as often as there are numbers."""
        seen.clear()
        for number, count in enumerate(epochs):
            training = replace(settings.training, epochs=count, sampling_steps=6, seed=1)
            train(replace(settings, model=model, training=training), folder, resume=number > 0)
        return list(seen)

    whole = fed(tmp_path / "whole", 4)
    assert whole == [fed_frames(6, 6, step, 1) for step in range(8)]
    assert len(set(map(tuple, whole))) > 3 and whole[6:] == [[False] * 6] * 2
    assert fed(tmp_path / "parts", 1, 3, 4) == whole


def test_without_it_nothing_is_drawn(settings, tmp_path, monkeypatch):
    seen, loss = [], CrevNet.loss
    monkeypatch.setattr(CrevNet, "loss", lambda *arguments: seen.append(arguments[-1]) or loss(*arguments))
    train(settings, tmp_path)
    assert seen == [None, None]
