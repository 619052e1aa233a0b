"""Files that another process has locked for writing: called locked, never damaged, and never left out."""

import fcntl
from contextlib import contextmanager

import h5py
import pytest

from crevnet.data.errors import DataError
from crevnet.data.files.days import open_days

SLOT = 14


@contextmanager
def locked(path):
    """As the HDF5 library does it for a process that writes."""
    with path.open("rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def check(line, path):
    assert f"{path} is locked" in line and "HDF5_USE_FILE_LOCKING=FALSE" in line
    assert "damaged" not in line and "download" not in line and "\n" not in line


def test_that_is_how_the_library_locks(own_cities):
    path = next(own_cities.rglob("*.h5"))
    with h5py.File(path, "r+"), path.open("rb") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)


@pytest.mark.parametrize("skip", ["true", "false"])
def test_a_locked_day(skip, own_cities, small, failing, tmp_path):
    path = own_cities / "Here" / "Here_training" / "20180102_100m_bins.h5"
    with locked(path):
        arguments = ("fit", "--data.root", own_cities, f"--data.skip_damaged={skip}", *small, "--out", tmp_path / "run")
        check(failing(*arguments), path)


def test_a_damaged_day_is_left_out_and_a_locked_one_is_not(own_cities):
    folder = own_cities / "Here" / "Here_training"
    (folder / "20180101_100m_bins.h5").write_bytes(b"damaged")
    left_out = pytest.warns(UserWarning, match=r"left out: .*20180101")
    refused = pytest.raises(DataError, match=r"20180102.* is locked")
    with locked(folder / "20180102_100m_bins.h5"), left_out, refused:
        open_days(own_cities, cities=["Here"], skip_damaged=True)


def test_a_locked_file_of_another_command(run, own_cities, crevnet, failing, tmp_path):
    city = ("--city.height=32", "--city.width=32", "--city.training_days=1", "--city.validation_days=0")
    crevnet("data", "synth", tmp_path / "made", *city)
    [made] = (tmp_path / "made").rglob("*.h5")
    with locked(made):
        check(failing("data", "synth", tmp_path / "made", *city), made)

    slots = ("--slots", f"[{SLOT}]")
    crevnet("data", "holdout", "--data.root", own_cities, "--data.cities=[Here]", "--out", tmp_path / "test", *slots)
    arguments = ("submit", run, "--test", tmp_path / "test", *slots, "--out", tmp_path / "submission")
    crevnet(*arguments)
    [answer] = (tmp_path / "submission").rglob("*.h5")
    with locked(answer):
        check(failing(*arguments), answer)
    hours = tmp_path / "hours" / "BERN" / "BERN_test_temporal.h5"
    hours.parent.mkdir(parents=True)
    hours.touch()
    with locked(hours):
        check(failing("score", tmp_path / "submission", "--protocol", "2021", "--truth", tmp_path / "hours"), hours)


def test_a_day_that_is_locked_while_a_worker_reads(own_cities, small, failing, monkeypatch, tmp_path):
    """Its error comes through the worker in one line."""
    from crevnet.data.files import days

    def no_lock(dataset, *arguments):
        if dataset.shape[0] > 1 and arguments[1] - arguments[0] > 1:
            raise BlockingIOError(11, "unable to lock file, errno = 11")
        return read(dataset, *arguments)

    read = days._read_slots
    monkeypatch.setattr(days, "_read_slots", no_lock)
    line = failing("fit", "--data.root", own_cities, *small, "--data.workers=1", "--out", tmp_path / "run")
    assert "is locked" in line and line.startswith(f"crevnet: {own_cities}") and "HDF5_USE_FILE_LOCKING=FALSE" in line
