"""Every model through the commands that CrevNet goes through, on the same data, with the same scores."""

import json
import shutil

import h5py
import numpy as np
import pytest
import torch
import yaml
from baseline_nets import TINY

from crevnet import MODELS, make_network
from crevnet.cli import main
from crevnet.training.checkpoint_reading import load_network
from crevnet.training.settings import TrainingSettings, load_settings
from crevnet.training.task import VideoModelTask

ONCE = ("--training.epochs=1", "--training.batches=2", "--training.accelerator=cpu")


def sizes(name):
    """The options of a tiny one."""
    options = {**TINY[name], "past": 3, "horizon": 2}
    return ["--model", name, *(f"--model.{k}={json.dumps(v)}" for k, v in options.items())]


@pytest.fixture(scope="module")
def tiny_cities(tmp_path_factory):
    """Two days of frames that VPN can generate, 6 x 5, with slots in which nothing moves."""
    root, generator = tmp_path_factory.mktemp("tiny"), np.random.default_rng(0)
    for split, date in (("training", "20180101"), ("validation", "20180102")):
        folder = root / "Tiny" / f"Tiny_{split}"
        folder.mkdir(parents=True)
        with h5py.File(folder / f"{date}_100m_bins.h5", "w") as file:
            file["array"] = generator.integers(0, 256, (10, 6, 5, 3), dtype=np.uint8)
    return root


def validation_windows(root):
    """(B, 5, 3, 6, 5), and the road map, which every pixel is on."""
    with h5py.File(root / "Tiny" / "Tiny_validation" / "20180102_100m_bins.h5") as file:
        frames = torch.from_numpy(file["array"][:].transpose(0, 3, 1, 2) / np.float32(255))
    return torch.stack((frames[:5], frames[5:])), torch.ones(2, 1, 6, 5)


@pytest.mark.parametrize("name", TINY)
def test_fit_evaluate_predict_show_and_resume(name, tiny_cities, crevnet, tmp_path):
    run, scores = tmp_path / "run", tmp_path / "scores.json"
    title = MODELS[name].config.title
    said = crevnet("fit", *sizes(name), *ONCE, "--out", run, "--data.root", tiny_cities)
    kind = "cross-entropy" if name == "vpn" else "MSE"
    assert f"best validation {kind}" in said
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["name"] == name
    model = load_settings(run).model
    assert type(model) is MODELS[name].config and model.past == 3
    network = load_network(run, model, "best").eval()
    (frames, roads), future = validation_windows(tiny_cities), slice(3, None)
    forecast = network.generate(frames[:, :3], roads)
    mse = (forecast.clamp(0, 1) - frames[:, future]).square().mean().item()
    best = mse if name != "vpn" else network.loss(frames, roads, "future").item()
    assert f"{kind} {best:.3e}"[:-5] in said

    said = crevnet("evaluate", run, "--json", scores)
    found = json.loads(scores.read_text())["Tiny"]
    assert next(iter(found)) == title and found[title]["mse"] == pytest.approx(mse, rel=1e-5)
    assert any(line.strip("│ ").startswith(title) for line in said.splitlines())

    crevnet("predict", run, "--slot", "8", "--out", tmp_path / "frames")
    with h5py.File(tmp_path / "frames" / "Tiny-20180102-008.h5") as file:
        expected = forecast[1].clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255
        assert np.abs(file["array"][:] - expected).max() <= 0.5 + 1e-3

    assert name in next(line for line in crevnet("show", run).splitlines() if "model.name" in line)
    crevnet("fit", "--resume", run, "--training.epochs=2")
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4


def test_model_named_in_a_config_file(tiny_cities, crevnet, tmp_path):
    config = tmp_path / "any.yaml"
    config.write_text("model:\n  name: unet\n  depth: 2\n  width: 2\n  past: 3\n  horizon: 2\n")
    crevnet("fit", "--config", config, *ONCE, "--out", tmp_path / "run", "--data.root", tiny_cities)
    model = load_settings(tmp_path / "run").model
    assert (model.name, model.depth, model.past) == ("unet", 2, 3)


def test_config_file_without_a_name_is_crevnet_s(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("  name: crevnet\n", ""))
    assert load_settings(folder) == load_settings(run)


@pytest.mark.parametrize("spelling", [["--model", "vpn"], ["--model=vpn"], ["--model.name", "vpn"]])
def test_spellings_and_the_papers_sizes(spelling, capsys):
    with pytest.raises(SystemExit):
        main(["fit", *spelling, "--print_config"])
    model = yaml.safe_load(capsys.readouterr().out)["model"]
    assert model == {
        "name": "vpn",
        "channels": 3,
        "static": ["road_map"],
        "past": 9,
        "horizon": 3,
        "width": 128,
        "dilations": [1, 2, 4, 8, 1, 2, 4, 8],
        "decoder_blocks": 12,
    }


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model", "lstm"], "no model lstm: choose one of crevnet, convlstm"),
        (["--model"], "--model"),
        (["--model", "unet", "--preset", "tiny"], "--preset tiny is a size of crevnet"),
        (["--model", "unet", "--model.hidden", "3"], "--model.hidden"),
        (["--model", "convlstm", "--model.kernel", "4"], "kernel must be odd"),
        (["--model", "vpn", "--model.width", "2"], "width"),
        (
            ["--model", "prednet", "--training.loss", "padded"],
            "prednet must be all, future, or the number of one future frame",
        ),
        (["--model", "unet", "--training.sampling_steps", "9"], "training.sampling_steps does not apply to unet"),
        (["--training.sampling_steps", "-1"], "training.sampling_steps"),
        (["--model", "predrnn", "--resume", "RUN"], "crevnet"),
    ],
)
def test_models_that_cannot_be(arguments, named, failing, run):
    assert named in failing("fit", *(str(run) if a == "RUN" else a for a in arguments))


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_vpn_is_not_generated_at_sizes_that_take_days(command, tiny_cities, crevnet, failing, tmp_path, monkeypatch):
    run = tmp_path / "run"
    crevnet("fit", *sizes("vpn"), *ONCE, "--out", run, "--data.root", tiny_cities)
    monkeypatch.setattr("crevnet.networks.baselines.vpn.MOST_GENERATED", 89)
    line = failing(command, run)
    assert str(run) in line and "in 90 passes at 6 x 5" in line


def test_feedback_is_crevnet_s_alone(tiny_cities, crevnet, failing, tmp_path):
    run = tmp_path / "run"
    crevnet("fit", *sizes("convlstm"), *ONCE, "--out", run, "--data.root", tiny_cities)
    assert "--feedback frame is only for CrevNet" in failing("evaluate", run, "--feedback", "frame")


@pytest.mark.parametrize("name", TINY)
def test_loss_over_the_future_alone(name):
    """The mean over all predictions is that over the first ones and the future ones, each by its share."""
    torch.manual_seed(0)
    network = make_network(MODELS[name].config(**TINY[name], channels=2, static=(), past=3, horizon=2)).double()
    frames = torch.rand(2, 5, 2, 6, 5, dtype=torch.float64)
    whole, future = network.loss(frames), network.loss(frames, over="future")
    if name == "unet":
        assert torch.equal(whole, future)
    else:
        torch.testing.assert_close(4 * whole, 2 * network.loss(frames[:, :3]) + 2 * future)
    torch.testing.assert_close(2 * future, network.loss(frames, over=1) + network.loss(frames, over=2))
    for number in (0, 3, True):
        with pytest.raises(ValueError, match="1 to 2; got"):
            network.loss(frames, over=number)
    with pytest.raises(
        ValueError, match="must be all, future, or the number of one future frame, 1 to 2; got 'padded'"
    ):
        network.loss(frames, over="padded")


@pytest.mark.parametrize("name", TINY)
def test_compiled_parts_have_the_same_loss_and_keys(name):
    config = MODELS[name].config(**TINY[name], channels=2, static=(), past=2, horizon=1)
    torch.manual_seed(0)
    task = VideoModelTask(config, TrainingSettings(channels_last=True))
    frames, graphs = torch.rand(1, 3, 2, 6, 5), []
    keys, expected = list(task.network.state_dict()), task.network.loss(frames)
    task.network.compile_parts(backend=lambda module, _: graphs.append(module) or module)
    torch.testing.assert_close(task.network.loss(frames), expected)
    assert graphs and list(task.network.state_dict()) == keys
    torch.compiler.reset()
