"""Whatever goes wrong on the command line: exit status 2, and one line that names the thing."""

import json

import h5py
import numpy as np
import pytest
import torch

from crevnet.cli import main


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "command"),
        (["nonsense"], "nonsense"),
        (["data"], "synth"),
        (["data", "paint"], "paint"),
        (["show"], "PATH is missing (see crevnet show --help)"),
        (["evaluate"], "RUN is missing (see crevnet evaluate --help)"),
        (["data", "synth"], "ROOT is missing (see crevnet data synth --help)"),
        (["submit", "run"], "--out is missing (see crevnet submit --help)"),
        (["fit", "--trainig.epochs", "3"], "--trainig.epochs"),
        (["fit", "--training.epocs", "3"], "--training.epocs"),
        (["fit", "--training.epochs", "many"], "many"),
        (["fit", "--training.epochs", "1.5"], "training.epochs"),
        (["fit", "--training.batches", "0"], "training.batches"),
        (["fit", "--training.accumulate", "0"], "training.accumulate"),
        (["fit", "--training.learning_rate", "nan"], "learning_rate"),
        (["fit", "--training.checkpoint_minutes", "0"], "training.checkpoint_minutes"),
        (["fit", "--training.loss", "some"], "training.loss"),
        (["fit", "--training.precision", "8"], "training.precision"),
        (["fit", "--model.cell", "gru"], "gru"),
        (["fit", "--model.past", "0"], "past"),
        (["fit", "--model.exact_bits", "53"], "exact_bits"),
        (["fit", "--model.exact_bits", "16", "--training.compile", "true"], "exact_bits"),
        (["fit", "--model.blocks", "[1,2]"], "blocks"),
        (["fit", "--model.strides", "[1,2,2,3]"], "strides"),
        (["fit", "--data.stride", "0"], "data.stride"),
        (["fit", "--data.workers", "-1"], "data.workers"),
        (["fit", "--data.training_slots", "7"], "data.training_slots"),
        (["fit", "--preset", "huge"], "huge"),
        (["fit", "--preset=huge"], "huge"),
        (["fit", "--preset"], "preset"),
        (["fit", "--config", "absent.yaml"], "absent.yaml"),
        (["fit"], "add --data.root FOLDER, or make a city with `crevnet data synth`"),
        (["show", "runs/absent"], "runs/absent does not exist: give a run's or a recipe's folder, or a day file"),
        (["fit", "--resume", "runs/absent"], "runs/absent does not exist: give the folder of a run"),
        (["evaluate", "runs/absent"], "runs/absent does not exist: give the folder of a run"),
        (["data", "synth", "here", "--city.height", "10"], "height"),
        (["data", "synth", "here", "--city.start_date", "today"], "today"),
        (["data", "synth", "here", "--city.start_date", "9999-12-31"], "9999-12-31"),
    ],
)
def test_wrong_options(arguments, named, failing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert named in failing(*arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "choices"),
    [
        ("protocol", "one of '2019', '2021', 'movies', null"),
        ("data.protocol", "one of '2019', '2021', 'movies'"),
        ("training.loss", "one of 'all', 'future', 'padded', int"),
        ("training.epochs", "int"),
    ],
)
def test_what_may_be_chosen_is_said_in_one_short_line(option, choices, failing):
    line = failing("fit", f"--{option}", "some")
    assert line == f'crevnet: Parser key "{option}": Expected {choices}. Got value: some (see crevnet fit --help)'


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        (["fit", "--data.rot", "x"], "; did you mean --data.root?"),
        (["recipe", "paper", "--frame.learning_rat", "1"], "; did you mean --frame.learning_rate?"),
        (["data", "synth", "x", "--city.heigth", "64"], "; did you mean --city.height?"),
        (["fit", "--config", "config.yaml"], "there is no option data.rot; did you mean data.root?"),
        (["recipe", "paper", "--config", "config.yaml"], "there is no option data.rot; did you mean data.root?"),
        (["fit", "--model", "unet", "--model.blocks", "3"], ""),  # CrevNet's, and nothing of the U-Net's is like it
    ],
)
def test_a_mistyped_option_is_answered_with_the_nearest(arguments, asked, failing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("data:\n  rot: x\n")
    line = failing(*arguments)
    assert asked in line and line.count("did you mean") == bool(asked)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"model:\n  chanels: 3\n", "chanels"),
        (b"model: [1,\n", "found '<stream end>' in line 2, column 1"),
        (b"only text", "only text"),
        (b"training:\n  epochs: many\n", "many"),
        (b"data: 3\n", "data is 3"),
        (b"data:\n  stride: 0\n", "data.stride must be at least 1"),
        (b"model:\n  name: resnet\n", "there is no model resnet"),
        (bytes(range(256)), "utf-8"),
    ],
)
def test_wrong_config_file(content, named, failing, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    line = failing("fit", "--config", path, "--out", tmp_path / "run")
    assert line.startswith(f"crevnet: --config {path}: ") and named in line
    assert failing("fit", f"--config={path}", "--out", tmp_path / "run") == line


def test_a_config_file_is_not_named_for_what_is_wrong_beside_it(failing, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("data:\n  root: x\n")
    assert failing("fit", "--config", path, "--data.stride=0") == "crevnet: data.stride must be at least 1, not 0"
    path.write_text("model:\n  name: unet\ndata:\n  stride: 0\n")  # whose options there are with the file alone
    line = failing("fit", "--config", path, "--model.depth=3")
    assert line == f"crevnet: --config {path}: data.stride must be at least 1, not 0"


@pytest.fixture
def fit(cities, small, failing, tmp_path):
    """Trains in vain; a later option stands for an earlier one."""
    folder = tmp_path / "run"
    once = ("--training.epochs=1", "--training.batches=1")
    return lambda *options: failing("fit", *small, "--out", folder, "--data.root", cities, *once, *options)


@pytest.mark.parametrize(
    ("option", "named"),
    [
        (("--data.root", "absent-folder"), "absent-folder"),
        (("--data.cities", "[Paris]"), "Paris"),
        (("--data.training_split", "test"), "test"),
        (("--data.validation_split", "test"), "test"),
        (("--data.training_slots", "[0,4]"), "data.training_slots [0,4] leaves 4 of the 20 frames of "),
        (("--data.validation_slots", "[0,4]"), "data.validation_slots [0,4] leaves 4 of the 20 frames of "),
        (
            ("--data.training_slots", "[9,2]"),
            "data.training_slots [9,2] is not a range: write [first,past-the-last], within",
        ),
        (("--data.validation_slots", "[20,24]"), "data.validation_slots [20,24] extends beyond "),
        (("--data.training_slots", "[0,500]"), "which has 20 slots: choose a range within [0,20]"),
        (("--model.past", "400"), "402"),
        (("--model.channels", "8"), "8"),
        (("--resume", "no-such-run"), "no-such-run"),
        (("--training.accelerator", "warp"), "warp"),
        (("--training.seed", "-1"), "seed"),
        (("--training.max_minutes", "1e-9"), "max_minutes"),
        (("--training.max_minutes", "1e30"), "max_minutes"),
        (("--model.exact_bits", "24"), "--model.exact_bits"),
    ],
)
def test_fit_that_cannot_be(option, named, fit):
    assert named in fit(*option)


def test_fit_on_an_empty_folder(fit, tmp_path):
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in fit("--data.root", tmp_path / "empty")


@pytest.mark.parametrize("inside", [False, True])
def test_fit_into_a_file(inside, fit, tmp_path):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "run" if inside else tmp_path / "file"
    why = "Not a directory" if inside else "File exists"
    assert fit("--out", out) == f"crevnet: {out} is no folder that can be written to ({why}): choose another --out"


def test_recipe_into_a_file(cities, small, failing, tmp_path):
    (tmp_path / "file").write_text("")
    line = failing("recipe", "paper", *small, "--data.root", cities, "--out", tmp_path / "file")
    assert f"{tmp_path / 'file'} is no folder that can be written to (File exists): choose another --out" in line


def test_fit_where_no_folder_can_be(fit):
    line = fit("--out", "/proc/nope")
    assert "/proc/nope is no folder that can be written to (No such file or directory): choose another --out" in line


def test_an_accelerator_that_is_not_there(fit, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    line = fit("--training.accelerator", "gpu")
    assert "training.accelerator gpu and training.devices 1 cannot be had here" in line
    assert "say --training.accelerator auto" in line


@pytest.mark.filterwarnings("default")
def test_a_precision_for_gpus_alone(cities, small, capsys, tmp_path):
    once = ("--training.epochs=1", "--training.batches=1", "--training.precision=16-mixed")
    main([str(a) for a in ("fit", *small, *once, "--data.root", cities, "--out", tmp_path / "run")])
    error = capsys.readouterr().err
    assert "warning: training.precision 16-mixed is for GPUs: it is bf16-mixed here\n" in error
    assert "Trainer(" not in error


@pytest.mark.parametrize("damage", ["garbage", "other", "missing key", "absent"])
def test_resume_from_a_checkpoint_that_cannot_be(damage, own_run, failing):
    path = own_run / "checkpoints" / "last.ckpt"
    if damage == "garbage":
        path.write_bytes(b"garbage")
    elif damage == "missing key":
        torch.save({"epoch": 1}, path)
    elif damage == "absent":
        path.unlink()
    other = ("--model.modules=3",) if damage == "other" else ()
    assert str(path) in failing("fit", "--resume", own_run, "--training.epochs=2", *other)


def test_fit_into_the_folder_of_a_finished_run(run, fit):
    line = fit("--out", run)
    assert str(run) in line and "--resume" in line


def day_of(root, city="Here", split="training"):
    return next((root / city / f"{city}_{split}").iterdir())


def damage(path, how):
    if how == "garbage":
        path.write_bytes(b"garbage" * 100)
    elif how == "half":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "slot":  # in the middle of the day, so that it shows when a window is read
        with h5py.File(path) as file:
            chunk = file["array"].id.get_chunk_info(9)
        with path.open("r+b") as file:
            file.seek(chunk.byte_offset)
            file.write(bytes(chunk.size))


@pytest.mark.parametrize("how", ["garbage", "half", "slot"])
@pytest.mark.parametrize("split", ["training", "validation"])
def test_damaged_day_is_named(how, split, own_cities, run, fit, failing):
    path = day_of(own_cities, split=split)
    damage(path, how)
    assert str(path) in fit("--data.root", own_cities)
    assert str(path) in failing("evaluate", run, "--data.root", own_cities)


@pytest.mark.filterwarnings("default")
def test_damaged_day_is_left_out_with_a_warning(own_cities, run, points, capsys, tmp_path):
    """Here has another training day, whose road map and mean are then all that is known of the city."""
    path = own_cities / "Here" / "Here_training" / "20180101_100m_bins.h5"
    damage(path, "garbage")
    out = tmp_path / "scores.json"
    main([str(a) for a in ("evaluate", run, "--data.root", own_cities, "--data.skip_damaged=true", "--json", out)])
    assert f"warning: left out: {path}" in capsys.readouterr().err
    found = json.loads(out.read_text())["Here"]["mean of training days"]["mse"]
    mean = points(1).mean(0) / 255
    truth = np.array([points(2)[s : s + 2] / 255 for s in (3, 8, 13, 18)])
    assert found == pytest.approx(np.square(truth - mean).mean(), rel=1e-4)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("command", ["fit", "evaluate", "predict"])
@pytest.mark.parametrize("why", ["absent", "damaged"])
def test_city_without_a_training_day_is_named(command, why, own_cities, run, fit, failing):
    """Its road map would come from its training days."""
    path = day_of(own_cities, "There")
    if why == "absent":
        path.unlink()
    else:
        damage(path, "garbage")
    options = ("--data.root", own_cities, "--data.skip_damaged=true")
    if command == "fit":
        assert "There" in fit(*options)
    else:
        assert "There" in failing(command, run, *options, *(["--city=There"] if command == "predict" else []))


@pytest.mark.parametrize("command", ["fit", "evaluate", "predict"])
def test_validation_days_of_another_frame_size_are_named(command, own_cities, write_day, points, run, fit, failing):
    for city, seed in (("Here", 2), ("There", 4)):
        write_day(own_cities, points(seed)[:, :10], city, "20180103", "validation")
    named = str(day_of(own_cities, split="validation"))
    options = ("--data.root", own_cities)
    assert named in (fit(*options) if command == "fit" else failing(command, run, *options))


@pytest.mark.parametrize("command", ["evaluate", "predict", "figures", "show"])
def test_folder_without_a_run(command, failing, tmp_path):
    line = failing(command, tmp_path)
    assert str(tmp_path) in line and "config.yaml" in line


@pytest.mark.parametrize("command", ["evaluate", "predict", "show"])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda text: text.replace("channels:", "chanels:"), "chanels"),
        (lambda text: text.replace("past: 3", "past: none"), "past"),
        (lambda text: text + "extra: 1\n", "extra"),
        (lambda text: "", "config.yaml"),
    ],
)
def test_run_with_a_wrong_config(command, change, named, own_run, failing):
    path = own_run / "config.yaml"
    path.write_text(change(path.read_text()))
    line = failing(command, own_run)
    assert named in line and str(path) in line


@pytest.mark.parametrize("command", ["evaluate", "predict", "figures"])
@pytest.mark.parametrize("damage", ["absent", "garbage", "half", "other"])
def test_run_with_a_damaged_checkpoint(command, damage, own_run, failing):
    path = own_run / "checkpoints" / "best.ckpt"
    if damage == "absent":
        path.unlink()
    elif damage == "other":
        config = own_run / "config.yaml"
        config.write_text(config.read_text().replace("modules: 2", "modules: 3"))
    else:
        path.write_bytes(b"garbage" if damage == "garbage" else path.read_bytes()[:9999])
    assert str(path) in failing(command, own_run)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--slot", "2"), "choose 3 to 18"),
        (("--slot", "19"), "choose 3 to 18"),
        (("--slot", "-1"), "--slot -1"),
        (("--slot", "noon"), "noon"),
        (("--city", "Paris"), "--city Paris"),
        (("--date", "20990101"), "--date 20990101"),
        (("--channel", "9"), "--channel 9"),
        (("--channel", "-1"), "--channel -1"),
        (("--feedback", "both"), "both"),
        (("--checkpoint", "worst"), "worst"),
        (("--data.validation_slots", "[2,6]"), "data.validation_slots [2,6] leaves 4"),
        (("--data.cities", "[Nowhere]"), "Nowhere"),
    ],
)
def test_prediction_that_cannot_be(options, named, run, failing, tmp_path):
    assert named in failing("predict", run, "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("predict RUN --out FILE", "FILE is no folder that can be written to (File exists): choose another --out"),
        ("evaluate RUN --json FOLDER", "FOLDER"),
        ("evaluate RUN --json FOLDER/absent/scores.json", "FOLDER/absent"),
        ("show DAY --slot 3 --out FOLDER/absent/day.png", "FOLDER/absent"),
        ("show DAY --slot 3 --out FOLDER/day.bogus", "bogus"),
        ("data synth FILE --city.height=32 --city.width=32", "FILE"),
    ],
)
def test_results_that_cannot_be_written(arguments, named, run, cities, failing, tmp_path):
    (tmp_path / "file").write_text("")
    meant = {"RUN": run, "DAY": day_of(cities), "FILE": tmp_path / "file", "FOLDER": tmp_path}

    def path(text):
        for word, folder in meant.items():
            text = text.replace(word, str(folder))
        return text

    assert path(named) in failing(*(path(word) for word in arguments.split()))


@pytest.mark.parametrize("command", ["evaluate RUN", "score ZIP --truth FOLDER"])
@pytest.mark.parametrize("json", ["", "absent/scores.json"])
def test_scores_that_could_not_be_written_are_not_computed(command, json, run, failing, tmp_path, monkeypatch):
    def scored(*_, **__):
        raise AssertionError("the scoring began")

    for begins in ("crevnet.evaluation.comparison.compare", "crevnet.traffic4cast.challenges.challenge"):
        monkeypatch.setattr(begins, scored)
    meant = {"RUN": run, "ZIP": tmp_path / "submission.zip", "FOLDER": tmp_path}
    line = failing(*(meant.get(word, word) for word in command.split()), "--json", tmp_path / json)
    assert line.startswith(f"crevnet: --json {tmp_path / json}") and "name a" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("slot", ["-1", "20"])
def test_show_a_slot_that_is_not_there(slot, cities, failing):
    assert f"--slot {slot}" in failing("show", day_of(cities), "--slot", slot)


def test_show_what_is_no_day_file(failing, tmp_path):
    path = tmp_path / "day.h5"
    assert str(path) in failing("show", path)
    path.write_bytes(b"garbage")
    assert str(path) in failing("show", path)


def test_interrupted(monkeypatch, capsys, cities):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("crevnet.cli.commands.show.run", interrupt)
    with pytest.raises(SystemExit) as stop:
        main(["show", str(cities)])
    assert stop.value.code == 130 and capsys.readouterr().err == "crevnet: interrupted\n"
