"""The command line, called as a program would be: its results, and one line for whatever goes wrong."""

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from crevnet import PRESETS, CrevNet
from crevnet.cli import main
from crevnet.training.settings import load_settings

CONFIGS = Path(__file__).parents[3] / "configs"
PAST, HORIZON, WINDOW = 3, 2, 5


def network(run, which="best"):
    model = CrevNet(load_settings(run).model)
    state = torch.load(run / "checkpoints" / f"{which}.ckpt", weights_only=True)["state_dict"]
    model.load_state_dict({k.removeprefix("network."): v for k, v in state.items()})
    return model


def as_frames(array):
    return torch.from_numpy(array.transpose(0, 3, 1, 2) / np.float32(255))[None]


def road_map(*days):
    return torch.from_numpy(np.concatenate(days).any(-1).mean(0).astype(np.float32))[None, None]


# --- fit


def test_fit_leaves_a_run_and_names_the_next_command(cities, small, crevnet, tmp_path):
    out = tmp_path / "new" / "run"
    said = crevnet("fit", *small, "--out", out, "--data.root", cities, "--training.epochs=1", "--training.batches=1")
    assert f"next: crevnet evaluate {out}" in said and "best validation MSE" in said
    settings = load_settings(out)
    assert settings.data.root == cities and settings.training.batches == 1
    assert (settings.model.blocks, settings.model.strides, settings.model.past) == ((1, 1), (1, 2), 3)
    assert (out / "checkpoints" / "best.ckpt").is_file() and (out / "checkpoints" / "last.ckpt").is_file()


def test_suggested_commands_are_a_shell_s(cities, small, crevnet, failing, tmp_path):
    out = tmp_path / "a run's é"
    said = crevnet("fit", *small, "--out", out, "--data.root", cities, "--training.epochs=1", "--training.batches=1")
    assert shlex.split(said.partition("next: ")[2].rstrip().removesuffix(")")) == ["crevnet", "evaluate", str(out)]
    shown = crevnet("show", out).splitlines()[-1]
    assert shlex.split(shown.partition(": ")[2]) == ["tensorboard", "--logdir", str(out)]
    line = failing("fit", *small, "--out", out, "--data.root", cities)
    assert shlex.split(line.partition("(")[2].partition(")")[0]) == ["--resume", str(out)]
    (out / "checkpoints" / "best.ckpt").unlink()
    assert shlex.split(failing("evaluate", out).partition(", or ")[2]) == ["--resume", str(out)]


def test_resuming_a_finished_run_says_that_nothing_was_left(own_run, crevnet):
    said = f"training of {own_run} is already complete: raise --training.epochs (it is 1) to continue"
    assert said in crevnet("fit", "--resume", own_run)
    assert "already complete" not in crevnet("fit", "--resume", own_run, "--training.epochs=2")


def test_fit_from_a_config_file_with_an_option_on_top_and_resumed(run, crevnet, tmp_path, monkeypatch):
    out = tmp_path / "run"
    crevnet("fit", "--config", run / "config.yaml", "--out", out, "--training.seed", "5", "--data.cities", "[There]")
    first, settings = load_settings(run), load_settings(out)
    assert settings.model == first.model and settings.training.batches == first.training.batches == 2
    assert settings.training.seed == 5 and settings.data.cities == ["There"]
    losses, loss = [], CrevNet.loss
    monkeypatch.setattr(CrevNet, "loss", lambda *arguments: losses.append(loss(*arguments)) or losses[-1])
    crevnet("fit", "--resume", out, "--training.epochs=2")
    assert len(losses) == 2  # the second epoch alone
    last = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)
    assert (last["epoch"], last["global_step"]) == (1, 4)
    resumed = load_settings(out)
    assert resumed == replace(settings, training=replace(settings.training, epochs=2))


@pytest.mark.parametrize("option", [("--preset", "authors"), ("--preset=authors",), ()])
def test_preset_gives_the_defaults_of_the_model(option, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", *option, "--model.horizon", "6", "--print_config"])
    assert stop.value.code == 0
    (tmp_path / "config.yaml").write_text(capsys.readouterr().out)
    model = yaml.safe_load((tmp_path / "config.yaml").read_text())["model"]
    expected = (6, 5, 6, (2, 2, 2, 2)) if option else (8, 9, 6, (3, 3, 3, 3))
    assert (model["modules"], model["past"], model["horizon"], tuple(model["blocks"])) == expected


# --- evaluate


def directly(run, points, feedback, which):
    """The scores of the network and of the last frame, with numpy from the arrays: the mean over two cities."""
    model, scores = network(run, which), {}
    for city, training, validation in (("Here", (0, 1), 2), ("There", (3,), 4)):
        roads = road_map(*(points(seed) for seed in training))
        errors, last_errors = [], []
        for start in range(0, 20, WINDOW):
            frames = as_frames(points(validation)[start : start + WINDOW])
            past, truth = frames[:, :PAST], frames[:, PAST:]
            known = roads if model.config.static else None
            found = model.generate(past, known, HORIZON, feedback).clamp(0, 1)
            errors.append((found - truth)[0].double().numpy())
            last_errors.append((past[:, -1:] - truth)[0].double().numpy())
        on_road = roads[0, 0].numpy() > 0
        scores[city] = [
            {
                "mse": (e**2).mean(),
                "mae": np.abs(e).mean(),
                "mse_by_channel": (e**2).mean((0, 1, 3, 4)),
                "mse_by_horizon": (e**2).mean((0, 2, 3, 4)),
                "mae_by_channel": np.abs(e).mean((0, 1, 3, 4)),
                "psnr": (-10 * np.log10((e**2).mean((3, 4)))).mean(),
                "psnr_by_horizon": (-10 * np.log10((e**2).mean((3, 4)))).mean((0, 2)),
                "mse_on_roads": (e**2)[..., on_road].mean(),
                "mse_summed": (e**2).sum((2, 3, 4)).mean(),
            }
            for e in (np.array(errors), np.array(last_errors))
        ]
    return scores


@pytest.mark.parametrize(
    ("which_run", "feedback", "which"),
    [("run", "latent", "best"), ("run", "frame", "last"), ("plain_run", "latent", "best")],
)
def test_evaluate_against_scores_computed_directly(which_run, feedback, which, points, crevnet, request, tmp_path):
    run = shutil.copytree(request.getfixturevalue(which_run), tmp_path / "run")
    path = run / "checkpoints" / "last.ckpt"
    last = torch.load(path, weights_only=True)
    last["state_dict"] = {k: 0.9 * v for k, v in last["state_dict"].items()}  # never the best one's
    torch.save(last, path)
    out = tmp_path / "scores.json"
    said = crevnet("evaluate", run, "--json", out, "--feedback", feedback, "--checkpoint", which)
    found = json.loads(out.read_text())
    assert found.keys() == {"windows", "horizons", "feedback", "checkpoint", "mean over cities", "Here", "There"}
    assert (found["windows"], found["feedback"], found["checkpoint"]) == (8, feedback, which)
    assert found["horizons"] == [1, 2]
    expected = directly(run, points, feedback, which)
    for number, name in enumerate(("CrevNet", "last frame")):
        for measure in expected["Here"][number]:
            by_city = [expected[city][number][measure] for city in ("Here", "There")]
            for city, value in zip(("Here", "There"), by_city, strict=True):
                assert found[city][name][measure] == pytest.approx(value, rel=1e-5), (city, name, measure)
            mean = sum(by_city) / 2
            assert found["mean over cities"][name][measure] == pytest.approx(mean, rel=1e-5), (name, measure)
    truth = [points(seed)[s : s + 2] / 255 for seed in (2, 4) for s in (3, 8, 13, 18)]
    assert found["mean over cities"]["zeros"]["mse"] == pytest.approx(np.square(truth).mean(), rel=1e-5)
    assert list(found["Here"]) == [
        "CrevNet",
        "zeros",
        "last frame",
        "mean of last three",
        "mean of training days",
        "mean of the slot",
    ]
    printed = [word for line in said.splitlines() if line.startswith("CrevNet ") for word in line.split()[1:]]
    scores, forms = found["mean over cities"]["CrevNet"], {"mse": ".3e", "mae": ".3e", "psnr": ".2f", "ssim": ".4f"}
    expected = [format(scores[measure], form) for measure, form in forms.items()]
    expected += [f"{scores['mse_summed']:.2f}", f"{scores['mse_on_roads']:.3e}"]
    for measure, form in forms.items():
        by = [*scores[f"{measure}_by_channel"], *scores[f"{measure}_by_horizon"]]
        expected += [format(value, form) for value in by]
    assert printed == [word.replace("None", "nan") for word in expected]
    assert max(map(len, said.splitlines())) <= 80
    assert "8 windows, 3 frames seen, 2 predicted" in said


def test_evaluate_takes_other_data_than_the_run_s(run, points, crevnet, tmp_path):
    out = tmp_path / "scores.json"
    crevnet("evaluate", run, "--json", out, "--data.cities", "[There]", "--data.validation_slots", "[10,20]")
    found = json.loads(out.read_text())
    truth = [points(4)[s : s + 2] / 255 for s in (13, 18)]
    assert found["windows"] == 2 and "Here" not in found
    assert found["There"]["zeros"]["mse"] == pytest.approx(np.square(truth).mean(), rel=1e-5)


def test_options_may_stand_before_the_run(run, crevnet):
    assert "8 windows" in crevnet("evaluate", "--checkpoint", "last", run)


# --- predict


@pytest.mark.parametrize("feedback", ["latent", "frame"])
def test_predict_writes_the_model_s_frames_and_pictures(feedback, run, points, crevnet, tmp_path):
    out = tmp_path / "new" / "folder"
    options = ("--city", "There", "--date", "20180103", "--slot", "7", "--out", out, "--channel", "2")
    said = crevnet("predict", run, *options, "--feedback", feedback)
    stem = out / "There-20180103-007"
    assert sorted(path.name for path in out.iterdir()) == [stem.name + s for s in (".gif", ".h5", ".png")]
    assert all(f"wrote {stem}{suffix}" in said for suffix in (".gif", ".h5", ".png"))
    past = as_frames(points(4)[4:7])
    expected = network(run).generate(past, road_map(points(3)), HORIZON, feedback)[0].clamp(0, 1) * 255
    with h5py.File(stem.with_suffix(".h5")) as file:
        found, attributes = file["array"][:], dict(file["array"].attrs)
    assert found.shape == (2, 21, 14, 3) and found.dtype == np.uint8
    assert found.any()
    assert np.abs(found - expected.permute(0, 2, 3, 1).numpy()).max() <= 0.5 + 1e-3
    assert attributes.pop("chunk_index")  # its seal
    assert attributes == {"city": "There", "date": "20180103", "first_slot": 7}
    with Image.open(stem.with_suffix(".png")) as picture:
        picture.load()
        assert picture.format == "PNG" and min(picture.size) > 100
    with Image.open(stem.with_suffix(".gif")) as animation:
        assert animation.format == "GIF" and animation.n_frames == WINDOW
        for k in range(WINDOW):
            animation.seek(k)
            animation.load()


def test_predict_without_options_takes_the_first_day_and_the_middle(own_run, crevnet):
    crevnet("predict", own_run)
    assert (own_run / "Here-20180103-010.h5").is_file()  # 08:00 is not among these 20 slots


def test_predict_at_eight_in_the_morning(run, write_day, points, crevnet, tmp_path):
    for split in ("training", "validation"):
        write_day(tmp_path / "data", points(5, slots=120), "Long", "20180101", split)
    crevnet("predict", run, "--data.root", tmp_path / "data", "--out", tmp_path / "out")
    assert (tmp_path / "out" / "Long-20180101-096.h5").is_file()


# --- show and data


def test_show_run(run, crevnet, monkeypatch):
    monkeypatch.chdir(run.parent)  # a path that fits the table's column
    said = crevnet("show", run.name)
    rows = {
        "model.past": "3",
        "model.strides": "[1,2]",
        "training.batches": "2",
        "best checkpoint": f"{run.name}/checkpoints/best.ckpt",
        "last checkpoint": f"{run.name}/checkpoints/last.ckpt",
    }
    for name, value in rows.items():
        assert value in next(line for line in said.splitlines() if name in line)
    assert f"{(run / 'checkpoints' / 'best.ckpt').stat().st_size / 2**20:.1f} MiB" in said
    assert f"tensorboard --logdir {run.name}" in said
    names = [line.split()[1] for line in said.partition("details")[0].splitlines() if line.startswith("│ ")]
    assert [name for name in names if name != "│"] == ["score", "model", "data", "progress"]  # a long path is folded
    parameters = sum(parameter.numel() for parameter in CrevNet(load_settings(run).model).parameters())
    assert f"CrevNet, {parameters:,} parameters: 3 frames seen, 2 predicted" in said and "1 of 1 epochs" in said


def test_show_day(cities, points, crevnet, tmp_path):
    path = cities / "Here" / "Here_training" / "20180101_100m_bins.h5"
    said = crevnet("show", path, "--slot", "5", "--out", tmp_path / "day.png")
    array = points(0)
    assert "20 x 21 x 14 x 3" in said
    assert f"{array.any(-1).any(0).mean():.1%}" in said
    speed = array[5, ..., 1]
    row = next(line for line in said.splitlines() if "speed, slot 5" in line)
    assert f"{(speed > 0).mean():.1%} of the pixels, mean {speed[speed > 0].mean():.1f} of 255" in row
    with Image.open(tmp_path / "day.png") as picture:
        picture.load()
        assert picture.format == "PNG" and picture.size[0] > picture.size[1]


def test_data_synth(crevnet, tmp_path):
    size = ("--city.height=32", "--city.width=33", "--city.training_days=1", "--city.validation_days=0")
    said = crevnet("data", "synth", tmp_path, *size, "--city.name=Ville")
    assert f"wrote 1 days to {tmp_path / 'Ville'}" in said and f"--data.root {tmp_path}" in said
    with h5py.File(tmp_path / "Ville" / "Ville_training" / "20180101_100m_bins.h5") as file:
        assert file["array"].shape == (288, 32, 33, 3) and file["array"][96].any()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configurations_are_complete(path, tmp_path):
    """Each is accepted, and says how many windows a batch has where a device's memory is meant."""
    shutil.copy(path, tmp_path / "config.yaml")
    settings = load_settings(tmp_path)
    if path.stem in PRESETS:
        assert settings.model == PRESETS[path.stem]
    if "v100" in path.stem:
        assert settings.model == PRESETS["paper"]
        assert settings.data.batch_size > 1 and settings.training.precision == "16-mixed"
