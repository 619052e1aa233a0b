"""What a run's folder holds: its config.yaml and its checkpoints, whole and damaged."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from crevnet import PRESETS, CrevNetConfig
from crevnet.data.errors import DataError
from crevnet.data.settings import DataSettings
from crevnet.machine.errors import SettingsError
from crevnet.training.checkpoint_reading import load_network
from crevnet.training.settings import RunSettings, TrainingSettings, load_settings
from crevnet.training.trainer import train


@pytest.mark.parametrize(
    "settings",
    [
        *(RunSettings(model) for model in PRESETS.values()),
        RunSettings(
            CrevNetConfig(
                channels=8,
                static=("clock", "road_map"),
                past=12,
                horizon=6,
                blocks=(1, 2, 3),
                strides=(2, 1, 2),
                bottleneck=3,
                modules=5,
                cell="convlstm",
            ),
            DataSettings(
                root=Path("some where/data: 1"),
                cities=["Berlin", "Sankt Pölten", "123"],
                training_split="test",
                training_slots=(0, 200),
                validation_split="training",
                validation_slots=(200, 288),
                stride=3,
                validation_stride=7,
                skip_damaged=True,
                batch_size=5,
                workers=2,
            ),
            TrainingSettings(
                7, 11, 13, 1e-5, 2, Path("runs/base"), 1000, 4, "bf16-mixed", 0.5, "gpu", 2, 99, True, True, 7.5
            ),
        ),
    ],
)
def test_config_round_trip(settings, tmp_path):
    settings.save(tmp_path / "run")
    assert load_settings(tmp_path / "run") == settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("channels:", "chanels:"), "chanels"),
        (lambda text: text + "\nextra: 1\n", "extra"),
        (lambda text: text.replace("past: 9", "past: many"), "model.past.*many"),
        (lambda text: text.replace("past: 9", "past: 0"), "past must be at least 1"),
        (lambda text: text.replace("stride: 1", "stride: 0"), "data.stride must be at least 1"),
        (lambda text: text.replace("learning_rate: 0.0002", "learning_rate: -1"), "learning_rate must be positive"),
        (
            lambda text: text.replace("exact_bits: null", "exact_bits: 16").replace("compile: false", "compile: true"),
            "training.compile rounds",
        ),
        (lambda text: "model: [1,\n", "parsing"),
        (lambda text: "only text", "only text"),
        (lambda text: "", "Unexpected config"),
    ],
)
def test_config_that_cannot_be_read_is_named_in_one_line(change, message, tmp_path):
    RunSettings().save(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(change(path.read_text()))
    with pytest.raises(SettingsError, match=message) as error:
        load_settings(tmp_path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_folder_without_config(tmp_path):
    with pytest.raises(SettingsError, match=r"no config\.yaml"):
        load_settings(tmp_path)
    with pytest.raises(SettingsError, match=r"absent does not exist"):
        load_settings(tmp_path / "absent")


def test_resuming_nothing(settings, tmp_path):
    with pytest.raises(DataError, match=r"last\.ckpt does not exist.*cannot resume"):
        train(settings, tmp_path, resume=True)
    assert not list(tmp_path.iterdir())


def test_finished_run_is_not_trained_over(run, settings):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with pytest.raises(DataError, match=r"already contains a trained run.*--resume"):
        train(settings, run)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.parametrize("which", ["best", "last"])
def test_loaded_network_has_the_checkpoint_s_weights(run, settings, which):
    checkpoint = torch.load(run / "checkpoints" / f"{which}.ckpt", map_location="cpu", weights_only=True)
    found = load_network(run, settings.model, which).state_dict()
    assert {f"network.{name}" for name in found} == checkpoint["state_dict"].keys()
    assert all(torch.equal(value, checkpoint["state_dict"][f"network.{name}"]) for name, value in found.items())


@pytest.mark.parametrize("content", [b"", b"garbage", "half", {"other": 1}, [1], {"state_dict": [1]}, None])
def test_damaged_checkpoint_is_named(content, run, settings, tmp_path):
    path = tmp_path / "checkpoints" / "best.ckpt"
    path.parent.mkdir()
    if content == "half":
        whole = (run / "checkpoints" / "best.ckpt").read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(DataError, match=r"best\.ckpt (is not a readable checkpoint|does not exist)") as error:
        load_network(tmp_path, settings.model, "best")
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_checkpoint_of_another_architecture(run, settings):
    with pytest.raises(DataError, match="another architecture"):
        load_network(run, replace(settings.model, modules=3), "best")
