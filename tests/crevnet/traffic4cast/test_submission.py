"""Submissions: what is written, kept and replaced, and everything that a score is refused for."""

import shutil
import zipfile
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from practice import array, fake_runs, predicted, write_array

from crevnet import CrevNet
from crevnet.cli import main
from crevnet.data.errors import DataError
from crevnet.traffic4cast.challenge2019 import Challenge2019
from crevnet.traffic4cast.forecasting import ensemble, submitted
from crevnet.traffic4cast.interface import Case
from crevnet.traffic4cast.submission import write_submission
from crevnet.training.settings import load_settings

SLOTS = ("--slots", "[16,34]")
HERE, THERE = "Here/Here_test/20180103_100m_bins.h5", "There/There_test/20180103_100m_bins.h5"


@pytest.fixture(scope="module")
def data(tmp_path_factory, write_day, points):
    """Test cases of 2019 of two cities, with the truth, and a training day of each city."""
    root = tmp_path_factory.mktemp("data")
    for number, city in enumerate(("Here", "There")):
        write_day(root, points(number, 40), city, "20180101", "training")
        write_day(root, points(2 + number, 40), city, "20180103", "validation")
    main([str(a) for a in ("data", "holdout", "--data.root", root, "--out", root, *SLOTS)])
    return root


@pytest.fixture
def submission(data, tmp_path, monkeypatch, crevnet):
    """A submission and the run that made it."""
    (run,) = fake_runs(tmp_path, monkeypatch, [0.5])
    crevnet("submit", run, "--data.root", data, "--out", tmp_path / "submission", *SLOTS)
    return tmp_path / "submission", run


def test_runs_may_differ_in_how_they_were_validated(data, tmp_path, monkeypatch, crevnet, failing):
    runs = fake_runs(tmp_path, monkeypatch, [0.5, 0.7], ["one", "other"])
    settings = load_settings(runs[1])
    replace(settings, data=replace(settings.data, validation_windows="test", validation_stride=2)).save(runs[1])
    crevnet("submit", *runs, "--data.root", data, "--out", tmp_path / "submission", *SLOTS)
    assert (tmp_path / "submission.zip").is_file()
    assert "say --data.validation_windows" in failing("evaluate", *runs)


# --- a recipe


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A finished one, whose networks are told by a factor of their own: base, Here and its frames, There and its frames."""
    names = ["base"] + [
        name for city in ("Here", "There") for name in (f"city/{city}", *(f"frame/{city}/{k}" for k in (1, 2, 3)))
    ]
    factors = [0.5, 0.6, 0.1, 0.2, 0.3, 0.8, 0.2, 0.4, 0.6]
    folder = tmp_path / "recipe"
    for run in fake_runs(folder, monkeypatch, factors, names):
        (run / "finished.yaml").write_text("score: 1.0")
    (folder / "recipe.yaml").write_text("")
    return folder


def test_a_recipe_submits_the_mean_of_its_stages(recipe, data, crevnet, tmp_path):
    out = tmp_path / "submission"
    crevnet("submit", recipe, "--data.root", data, "--out", out, *SLOTS)
    for name, tuned, framed in ((HERE, 0.6, (0.1, 0.2, 0.3)), (THERE, 0.8, (0.2, 0.4, 0.6))):
        day = array(data / name)
        for block, slot in zip(array(out / name), (16, 34), strict=True):
            past = day[slot - 12 : slot]
            of_frames = np.stack([predicted(past, factor, (1, 2, 3))[k] for k, factor in enumerate(framed)])
            mean = (predicted(past, 0.5, (1, 2, 3)) + predicted(past, tuned, (1, 2, 3)) + of_frames) / 3
            assert np.abs(block - mean).max() <= 0.5 + 1e-3


def test_a_recipe_that_is_not_done_is_not_submitted(recipe, data, failing, tmp_path):
    (recipe / "frame" / "There" / "2" / "finished.yaml").unlink()
    line = failing("submit", recipe, "--data.root", data, "--out", tmp_path / "submission", *SLOTS)
    assert str(recipe / "frame" / "There" / "2") in line and f"crevnet recipe paper --out {recipe}" in line
    assert not (tmp_path / "submission").exists()


def test_a_recipe_of_other_frames_is_not_submitted(recipe, data, failing, tmp_path):
    path = recipe / "base" / "config.yaml"
    path.write_text(path.read_text().replace("horizon: 3", "horizon: 2"))
    line = failing("submit", recipe, "--data.root", data, "--out", tmp_path / "submission", *SLOTS)
    assert f"{recipe} is tuned for 2 frames" in line and "requires 3" in line


# --- values


def test_values_are_clipped_and_rounded_half_to_even():
    values = np.array([-0.5, -7, 0.5, 0.51, 1.5, 2.5, 254.5, 255.4, 256, 1e9])
    assert submitted(values).tolist() == [0, 0, 0, 1, 2, 2, 254, 255, 255, 255]
    assert submitted(values).dtype == np.uint8
    for bad in (np.nan, np.inf):
        with pytest.raises(DataError, match="not finite"):
            submitted(np.array([1, bad]))


@pytest.mark.parametrize(("weights", "expected"), [(None, 4), ([3, 1], 3), ([0.1, 0.3], 5)])
def test_an_ensemble_is_the_mean_before_rounding(weights, expected):
    """2.4 and 5.6 would be 2 and 6 if they were rounded before."""
    members = [lambda case: np.full(3, 2.2), lambda case: np.full(3, 5.8)]
    found = ensemble(members, weights)(Case(None, 0, None))
    assert found == pytest.approx(np.average([2.2, 5.8], weights=weights))
    assert submitted(found).tolist() == [expected] * 3


def test_a_trained_crevnet(data, run, points, crevnet, tmp_path):
    """It sees 3 of the 12 frames and was trained to predict 2; the road map comes from the city's training day."""
    crevnet("submit", run, "--data.root", data, "--out", tmp_path / "submission", *SLOTS)
    state = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    network = CrevNet(load_settings(run).model)
    network.load_state_dict({k.removeprefix("network."): v for k, v in state.items()})
    for number, name in enumerate((HERE, THERE)):
        roads = torch.from_numpy(points(number, 40).any(-1).mean(0).astype(np.float32))[None, None]
        found = array(tmp_path / "submission" / name)
        assert found.any() and found.shape == (2, 3, 21, 14, 3)
        for index, first in enumerate((16, 34)):
            past = points(2 + number, 40)[first - 3 : first].transpose(0, 3, 1, 2) / np.float32(255)
            expected = network.generate(torch.from_numpy(past)[None], roads, 3)[0].permute(0, 2, 3, 1).numpy() * 255
            assert np.abs(found[index] - expected.clip(0, 255)).max() <= 0.5 + 1e-3


def test_a_file_is_as_the_competition_asks_for_it(submission):
    out, _ = submission
    with h5py.File(out / HERE) as file:
        assert list(file) == ["array"]
        array = file["array"]
        assert (array.compression, array.compression_opts, array.dtype) == ("gzip", 9, np.uint8)
    with zipfile.ZipFile(f"{out}.zip") as archive:
        assert archive.namelist() == [HERE, THERE] and archive.testzip() is None


# --- going on


def interrupted_after(cases):
    """A forecast that is interrupted when so many cases are done."""

    def forecast(case):
        nonlocal cases
        if not cases:
            raise KeyboardInterrupt
        cases -= 1
        return np.full((3, 21, 14, 3), 7)

    return forecast


def test_an_interrupted_submission_goes_on(data, tmp_path):
    files = Challenge2019([16, 34]).case_files(data, None)
    out, done = tmp_path / "submission", []
    with pytest.raises(KeyboardInterrupt):
        write_submission(files, interrupted_after(3), out, "these", False, done.append)
    assert [path.name for path in out.rglob("*.*")] == [(out / HERE).name]  # nothing of the other city's file
    before = (out / HERE).stat().st_mtime_ns
    write_submission(files, interrupted_after(2), out, "these", False, done.append)
    assert (out / HERE).stat().st_mtime_ns == before and (array(out / THERE) == 7).all()
    assert sum(done) == 3 + 4


def test_files_made_from_something_else_are_not_replaced_unasked(
    submission, data, crevnet, failing, tmp_path, monkeypatch
):
    out, run = submission
    before = (out / HERE).read_bytes()
    options = ("--data.root", data, "--out", out, *SLOTS)
    crevnet("submit", run, *options)
    assert (out / HERE).read_bytes() == before
    assert str(out / HERE) in failing("submit", run, *options, "--feedback", "frame")
    (run / "checkpoints" / "best.ckpt").write_text("trained on")
    assert "--overwrite" in failing("submit", run, *options)
    assert (out / HERE).read_bytes() == before
    fake_runs(tmp_path / "other", monkeypatch, [0.25])
    crevnet("submit", tmp_path / "other" / "run-0.25", *options, "--overwrite")
    assert array(out / HERE).max() <= 64


def test_what_is_no_submission_s_file_is_not_replaced_unasked(submission, data, failing):
    out, run = submission
    (out / HERE).write_bytes(b"mine")
    assert str(out / HERE) in failing("submit", run, "--data.root", data, "--out", out, *SLOTS)
    assert (out / HERE).read_bytes() == b"mine"


def test_a_run_for_each_city(data, crevnet, tmp_path, monkeypatch):
    """A submission grows city by city, as each may have a model that was trained on it further."""
    one, other = fake_runs(tmp_path, monkeypatch, [0.25, 0.75])
    out = tmp_path / "submission"
    for run, city in ((one, "Here"), (other, "There")):
        crevnet("submit", run, "--data.root", data, "--out", out, *SLOTS, "--data.cities", f"[{city}]")
    assert array(out / HERE).max() <= 64 < array(out / THERE).max()
    with zipfile.ZipFile(f"{out}.zip") as archive:
        assert archive.namelist() == [HERE, THERE]


# --- what cannot be submitted


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--weights", "[1,2]"), "--weights"),
        (("--weights", "[-1]"), "--weights"),
        (("--weights", "[.nan]"), "--weights"),
        (("--data.protocol", "2020"), "protocol"),
        (("--data.protocol", "2021"), "--task"),
        (("--data.protocol", "movies"), "movies"),
        (("--test", "absent"), "absent"),
        (("--data.cities", "[Paris]"), "Paris"),
        (("--slots", "[]"), "--slots"),
        (("--slots", "[11,16]"), "--slots [11, 16]"),
        (("--slots", "[38]"), "12 to 37"),
        (("--slots", "null"), "--slots"),
        (("--checkpoint", "last"), "last.ckpt"),
    ],
)
def test_submissions_that_cannot_be(options, named, data, failing, tmp_path, monkeypatch):
    (run,) = fake_runs(tmp_path, monkeypatch, [0.5])
    out = tmp_path / "submission"
    assert named in failing("submit", run, "--data.root", data, "--out", out, *SLOTS, *options)
    assert not out.exists()


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ({"channels": 8}, "8 channels"),
        ({"past": 13}, "13 past frames"),
        ({"static": ("road_map",)}, "no file of Here"),
        ({"static": ("connectivity",)}, "no file of Here"),
    ],
)
def test_runs_that_cannot_be_submitted(model, named, data, failing, tmp_path, monkeypatch):
    (run,) = fake_runs(tmp_path, monkeypatch, [0.5], **model)
    (tmp_path / "empty" / "There" / "There_training").mkdir(parents=True)
    shutil.copy(data / "There/There_training/20180101_100m_bins.h5", tmp_path / "empty/There/There_training")
    where = ("--data.root", tmp_path / "empty", "--test", data)
    assert named in failing("submit", run, *where, "--out", tmp_path / "submission", *SLOTS)


def test_days_of_another_frame_size_are_named(data, run, write_day, points, failing, tmp_path):
    """Than the training days, from which the road map and the historical mean come."""
    other = tmp_path / "other"
    for city in ("Here", "There"):
        write_day(other, points(0, 40, 15, 14), city, "20180101", "training")
    line = failing("submit", run, "--data.root", other, "--test", data, "--out", tmp_path / "out", *SLOTS)
    assert f"{run} cannot predict {data / HERE}" in line


def test_historical_means_of_another_frame_size_are_named(submission, data, write_day, points, failing, tmp_path):
    for city in ("Here", "There"):
        write_day(tmp_path / "other", points(0, 40, 15, 14), city, "20180101", "training")
    line = failing("score", submission[0], "--truth", data, "--data.root", tmp_path / "other", *SLOTS)
    assert "(15, 14, 3)" in line and str(data / HERE) in line


@pytest.mark.filterwarnings("default")
def test_blocks_that_are_not_there_are_warned_of(data, capsys, tmp_path, monkeypatch):
    (run,) = fake_runs(tmp_path, monkeypatch, [0.5])
    path = shutil.copytree(data, tmp_path / "data") / HERE
    with h5py.File(path, "r+") as file:
        file["array"][4:16] = 0
    main([str(a) for a in ("submit", run, "--data.root", tmp_path / "data", "--out", tmp_path / "out", *SLOTS)])
    assert f"warning: {path}: the 12 frames before slot 16 are all zero" in capsys.readouterr().err


# --- what cannot be scored


def test_everything_that_is_wrong_is_listed(submission, data, capsys):
    """Each of these would keep a submission from being scored, in a folder as in a zip."""
    out, _ = submission
    good = array(out / HERE)
    cases = {
        "dataset": lambda path: write_array(path, good, "predictions"),
        "shape": lambda path: write_array(path, good[:1]),
        "dtype": lambda path: write_array(path, good.astype(np.int16)),
        "nan": lambda path: write_array(path, np.full(good.shape, np.nan, np.float32)),
        "scalar": lambda path: write_array(path, np.uint8(3)),
        "garbage": lambda path: path.write_bytes(b"garbage" * 99),
        "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        "empty": lambda path: path.write_bytes(b""),
        "chunk": damage_chunk,
    }
    said = {
        "dataset": "cannot be read (it has no dataset 'array', only 'predictions')",
        "shape": f"has shape (1, 3, 21, 14, 3), expected {good.shape}",
        "dtype": "has dtype int16, expected uint8",
        "nan": "has dtype float32, expected uint8",
        "scalar": "has shape (), expected",
    }
    for name, damage in cases.items():
        folder = shutil.copytree(out, out.parent / f"damaged-{name}")
        damage(folder / HERE)
        (folder / THERE).unlink()
        (folder / "notes.txt").write_text("mine")
        archive = shutil.make_archive(str(folder), "zip", folder)
        for path in (folder, archive):
            capsys.readouterr()
            with pytest.raises(SystemExit) as stop:
                main([str(a) for a in ("score", path, "--truth", data, *SLOTS)])
            printed = capsys.readouterr()
            lines = printed.out.splitlines()
            assert stop.value.code == 2 and lines[0] == "notes.txt: unexpected" and lines[-1] == f"{THERE}: missing"
            assert lines[1].startswith(f"{HERE}: {said.get(name, 'cannot be read')}"), lines
            assert (f"{HERE}: contains NaN" in lines) == (name == "nan")
            assert len(printed.err.splitlines()) == 1 and f"{len(lines)} problems" in printed.err
        assert len(lines) == (4 if name == "nan" else 3)


def damage_chunk(path):
    with h5py.File(path) as file:
        chunk = file["array"].id.get_chunk_info(1)
    with path.open("r+b") as file:
        file.seek(chunk.byte_offset)
        file.write(bytes(chunk.size))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(b"garbage"), "cannot be read"),
        (lambda path: write_array(path, np.zeros((40, 9, 9, 3), np.uint8)), "(40, 9, 9, 3)"),
    ],
)
def test_truth_that_cannot_be(damage, named, submission, data, failing, tmp_path):
    path = shutil.copytree(data, tmp_path / "data") / HERE.replace("_test/", "_test_truth/")
    damage(path)
    line = failing("score", submission[0], "--truth", tmp_path / "data", *SLOTS)
    assert str(path) in line and named in line


def test_what_is_neither_a_folder_nor_a_zip(submission, data, failing, tmp_path):
    (tmp_path / "file").write_text("no zip")
    for path in ("file", "absent"):
        assert str(tmp_path / path) in failing("score", tmp_path / path, "--truth", data, *SLOTS)
    assert "absent" in failing("score", submission[0], "--truth", tmp_path / "absent", *SLOTS)
    assert "is named twice" in failing("score", submission[0], submission[0], "--truth", data, *SLOTS)
    assert "absent" in failing("score", submission[0], "--truth", data, *SLOTS, "--data.root", tmp_path / "absent")


def test_a_submission_that_is_not_there(data, failing, tmp_path):
    line = failing("score", tmp_path / "absent", "--truth", data, *SLOTS)
    assert f"{tmp_path / 'absent'} is neither a folder nor a zip" in line
