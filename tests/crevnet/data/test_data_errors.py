"""Malformed files, lists and values: one line that names the thing and the remedy, and nothing written or overwritten."""

import shutil

import days_2021
import h5py
import numpy as np
import pytest

DATES = "--data.validation_dates"


def write(path, array, name="array"):
    """One dataset; None is a group in its place."""
    path.unlink(missing_ok=True)
    with h5py.File(path, "w") as file:
        if array is None:
            file.create_group(name)
        else:
            file[name] = array


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def make_folder(path):
    path.unlink()
    path.mkdir()


def make_dangling(path):
    path.unlink()
    path.symlink_to(path.with_name("nowhere.h5"))


def rename(path, name):
    path.rename(path.with_name(name))


FRAMES, STATIC = days_2021.frames(11), days_2021.static(2)
LEAVE_OUT, AGAIN = "leave it out", "download"
DAYS = {
    "empty": (lambda path: path.write_bytes(b""), "0 bytes", LEAVE_OUT),
    "not HDF5": (lambda path: path.write_text("<html>404</html>"), "signature", AGAIN),
    "truncated": (truncate, "truncated", AGAIN),
    "folder": (make_folder, "is a folder", "move it away"),
    "dangling link": (make_dangling, "No such file", AGAIN),
    "no dataset": (lambda path: write(path, None), "no dataset", LEAVE_OUT),
    "text": (lambda path: write(path, np.array([b"frames"])), "dtype |S6, expected numbers", LEAVE_OUT),
    "single number": (lambda path: write(path, np.uint8(3)), "shape ()", LEAVE_OUT),
    "no slots": (lambda path: write(path, FRAMES[:0]), "shape (0, 21, 14, 8)", LEAVE_OUT),
    "three dimensions": (lambda path: write(path, FRAMES[0]), "shape (21, 14, 8)", LEAVE_OUT),
    "channels": (lambda path: write(path, FRAMES[..., :3]), "(21, 14, 3)", LEAVE_OUT),
    "frame size": (lambda path: write(path, FRAMES[:, 1:]), "(20, 14, 8)", LEAVE_OUT),
    "float": (lambda path: write(path, FRAMES / 255), "dtype float64, expected uint8 or int16", LEAVE_OUT),
    "negative": (lambda path: write(path, FRAMES.astype(np.int16) - 1), "values -1..254, expected 0..255", LEAVE_OUT),
    "large": (lambda path: write(path, FRAMES.astype(np.int16) + 1), "values 1..256, expected 0..255", LEAVE_OUT),
    "no such date": (
        lambda path: rename(path, "2019-02-30_BERLIN_8ch.h5"),
        "20190230, which is not a date",
        "rename it",
    ),
}
STATICS = {
    "absent": (lambda path: path.unlink(), "does not exist", "--data.cities"),
    "not HDF5": (lambda path: path.write_text("<html>404</html>"), "signature", AGAIN),
    "truncated": (truncate, "truncated", AGAIN),
    "folder": (make_folder, "is a folder", "move it away"),
    "no dataset": (lambda path: write(path, None), "no dataset", AGAIN),
    "high resolution": (lambda path: write(path, np.zeros((210, 140), np.uint8)), "uint8 (210, 140)", AGAIN),
    "road map alone": (lambda path: write(path, STATIC[:1]), "expected uint8 (9, 21, 14)", AGAIN),
    "another size": (lambda path: write(path, STATIC[:, 1:]), "(9, 20, 14), expected uint8 (9, 21, 14)", AGAIN),
    "NaN": (lambda path: write(path, np.full(STATIC.shape, np.nan)), "float64 (9, 21, 14)", AGAIN),
}
LISTS = {
    "no such date": (b"2019-01-02\n2019-02-29\n", "'2019-02-29'", "YYYY-MM-DD"),
    "another way to write dates": (b"02.01.2019", "'02.01.2019'", "YYYY-MM-DD"),
    "two in a line": (b"2019-01-01,2019-01-02", "'2019-01-01,2019-01-02'", "YYYY-MM-DD"),
    "empty": (b"\n\n", "is empty", "YYYY-MM-DD"),
    "no text": (bytes(range(256)), "utf-8", "one date per line"),
    "none of the data's": (b"2020-01-02", "no day for data.validation_dates", "check the lists"),
    "all of the data's": (
        b"2019-01-01\n2019-01-02\n2019-01-03\n2019-01-04",
        "no day for data.training_dates",
        "check the lists",
    ),
}


@pytest.fixture
def fit(small, failing, cities_2021, tmp_path):
    """Trains in vain on the cities of 2021; returns the line. Nothing may have been written."""

    def call(*options):
        before = sorted(tmp_path.rglob("*"))
        given = (
            "--model.channels=8",
            "--data.protocol=2021",
            "--data.validation_split=training",
            f"{DATES}=[2019-01-02]",
        )
        line = failing("fit", *small, *given, "--data.root", cities_2021, "--out", tmp_path / "run", *options)
        assert sorted(tmp_path.rglob("*")) == before
        return line

    return call


@pytest.mark.parametrize("kind", DAYS)
def test_days(kind, cities_2021, fit):
    damage, what, remedy = DAYS[kind]
    damage(cities_2021 / "BERLIN" / "training" / "2019-01-01_BERLIN_8ch.h5")
    line = fit()
    assert str(cities_2021 / "BERLIN" / "training" / "2019-0") in line and what in line and remedy in line


@pytest.mark.parametrize("kind", STATICS)
def test_static_files(kind, cities_2021, fit):
    damage, what, remedy = STATICS[kind]
    path = cities_2021 / "BERLIN" / "BERLIN_static.h5"
    damage(path)
    line = fit()
    assert str(path) in line and what in line and remedy in line


@pytest.mark.parametrize("kind", LISTS)
def test_lists_of_dates(kind, fit, tmp_path):
    content, what, remedy = LISTS[kind]
    (tmp_path / "dates.txt").write_bytes(content)
    line = fit(f"{DATES}={tmp_path / 'dates.txt'}")
    assert what in line and remedy in line


@pytest.mark.parametrize(
    ("options", "named", "remedy"),
    [
        ([f"{DATES}=absent.txt"], "absent.txt", "one date per line"),
        ([f"{DATES}=2019-01-02"], "2019-01-02", "a list [2019-01-31]"),
        ([f"{DATES}=[]"], "data.validation_dates", "YYYY-MM-DD"),
        ([f"{DATES}=[2019-01-32]"], "'2019-01-32'", "YYYY-MM-DD"),
        (["--data.training_dates=[2019-01-01,2019-01-02]"], "2019-01-02_ANTWERP_8ch.h5", DATES),
        (["--data.protocol=2019"], "YYYYMMDD_100m_bins.h5", "--data.protocol"),
        (["--data.protocol=2020"], "data.protocol", "'2019', '2021' or 'movies'"),
        (["--data.heading_order=n-e-s-w"], "data.heading_order", "'ne-se-sw-nw' or 'ne-nw-se-sw'"),
        (["--data.flips=diagonal"], "data.flips", "'horizontal', 'vertical' or 'both'"),
        (["--data.validation_windows=test"], "data.validation_windows", "use strided"),
        (["--data.cities=[Berlin]"], "Berlin", "found ANTWERP, BERLIN"),
        (["--data.training_split=test"], "'test'", "<CITY>/test/YYYY-MM-DD_<CITY>_8ch.h5"),
        (["--model.channels=3"], "8 channels, but the model has 3", "--model.channels"),
        (["--protocol=2020"], "protocol", "'2019', '2021', 'movies'"),
    ],
)
def test_values(options, named, remedy, fit):
    line = fit(*options)
    assert named in line and remedy in line


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("data: 3", "data is 3"),
        ("data: null", "data is None"),
        ("data: [1]", "data is [1]"),
        ("data:\n  workers: null", "data.workers"),
        ("data:\n  stride: 1.5", "data.stride"),
        ("data:\n  validation_dates: [2019-02-31]", "'2019-02-31'"),
        ("data:\n  protocol: 2021", "data.protocol"),
    ],
)
def test_configuration_files(content, named, failing, tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text(content)
    assert named in failing("fit", "--config", path, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_a_finished_run_whose_static_file_is_gone(command, cities_2021, small, crevnet, failing, tmp_path):
    run = tmp_path / "run"
    options = (
        "--model.channels=8",
        "--data.protocol=2021",
        "--data.validation_split=training",
        f"{DATES}=[2019-01-02]",
    )
    once = ("--training.epochs=1", "--training.batches=1")
    crevnet("fit", *small, *options, *once, "--data.root", cities_2021, "--data.cities=[BERLIN]", "--out", run)
    (cities_2021 / "BERLIN" / "BERLIN_static.h5").unlink()
    files = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert "BERLIN_static.h5 does not exist" in failing(command, run)
    shutil.rmtree(cities_2021)
    assert f"{cities_2021} cannot be listed" in failing(command, run)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == files
