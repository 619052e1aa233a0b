"""A disk that is full, whatever is written to it: one line with the remedy, and no half of a file."""

import errno
import os
import resource
import shutil
import signal
import subprocess
from collections import namedtuple
from contextlib import contextmanager

import h5py
import numpy as np
import pytest
from processes import at_call, end, kill, start

from crevnet.data.files.hdf5_writing import writing_hdf5
from crevnet.machine.files import NoRoomError, remove_unfinished, replace_file, replacing

SLOT = 14  # of days of 20 slots, to predict after the 12 that a test case shows
LITTLE = 1500  # bytes: less than any file takes that a test writes


@contextmanager
def little_disk(size=LITTLE):
    """No file of this process grows beyond `size` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextmanager
def small_file_system(folder, size="4M"):
    """A tmpfs, where mounting is allowed; the test is skipped where it is not."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def fill(disk, left):
    """Leave so many bytes free."""
    with (disk / "other").open("wb", buffering=0) as file:
        with pytest.raises(OSError, match="No space"):
            while file.write(bytes(4096)):
                pass
        file.truncate(file.tell() - left)


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def held_out(cities, tmp_path_factory):
    """Test cases of the two cities' validation days."""
    from crevnet.cli import main

    out = tmp_path_factory.mktemp("held-out") / "test"
    main(["data", "holdout", "--data.root", str(cities), "--out", str(out), "--slots", f"[{SLOT}]"])
    return out


def command(name, out, run, cities, held_out):
    """Arguments that write one or more files into the folder `out`."""
    day = cities / "Here" / "Here_validation" / "20180103_100m_bins.h5"
    city = ("--city.height=32", "--city.width=32", "--city.training_days=1", "--city.validation_days=0")
    return {
        "data synth": ("data", "synth", out, *city),
        "data holdout": ("data", "holdout", "--data.root", cities, "--out", out, "--slots", f"[{SLOT}]"),
        "submit": ("submit", run, "--test", held_out, "--slots", f"[{SLOT}]", "--out", out / "submission"),
        "predict": ("predict", run, "--out", out),
        "figures": ("figures", run, "--out", out),
        "show": ("show", day, "--out", out / "day.png"),
    }[name]


COMMANDS = ("data synth", "data holdout", "submit", "predict", "figures", "show")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_that_finds_no_room(name, run, cities, held_out, failing, tmp_path):
    (tmp_path / "out").mkdir()
    with little_disk():
        line = failing(*command(name, tmp_path / "out", run, cities, held_out), status=1)
    assert (
        line.startswith(f"crevnet: no space left for {tmp_path / 'out'}")
        and "(File too large): raise the limit" in line
    )
    assert files(tmp_path / "out") == []


@pytest.mark.parametrize("name", ["data synth", "submit", "predict"])
def test_a_file_system_that_is_full(name, run, cities, held_out, tmp_path):
    """In a process of its own: the HDF5 library used to end it with SIGSEGV."""
    with small_file_system(tmp_path / "disk") as disk:
        fill(disk, 4096)
        process = start(command(name, disk / "out", run, cities, held_out), tmp_path / "said")
        assert end(process) == 1
        said = (tmp_path / "said").read_text()
        [line] = [line for line in said.splitlines() if line.startswith("crevnet: ")]
        assert f"no space left for {disk / 'out'}" in line and "(No space left on device): free 1 MiB or more" in line
        assert "Traceback" not in said
        assert files(disk) == ["other"]


def test_the_zip_of_a_submission_finds_no_room(run, cities, held_out, failing, crevnet, tmp_path):
    """Though its files did: the same command then needs the zip alone."""
    arguments = command("submit", tmp_path, run, cities, held_out)
    crevnet(*arguments)
    zipped = tmp_path / "submission.zip"
    largest = max(path.stat().st_size for path in (tmp_path / "submission").rglob("*.h5"))
    zipped.unlink()
    with little_disk(largest):
        line = failing(*arguments, status=1)
    assert line.startswith(f"crevnet: no space left for {zipped} (File too large)")
    assert not zipped.exists() and not list(tmp_path.glob("*.unfinished"))
    crevnet(*arguments)
    assert zipped.exists()


@pytest.mark.parametrize("name", ["predict", "show"])
def test_the_old_file_stays_where_a_new_one_finds_no_room(name, run, cities, held_out, crevnet, failing, tmp_path):
    arguments = command(name, tmp_path / "out", run, cities, held_out)
    (tmp_path / "out").mkdir()
    crevnet(*arguments)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with little_disk():
        failing(*arguments, status=1)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_an_animation_that_finds_no_room(run, cities, held_out, failing, monkeypatch, tmp_path):
    """Though the file before it did."""
    monkeypatch.setattr("crevnet.figures.save", lambda figure, path: None)
    arguments = command("predict", tmp_path / "out", run, cities, held_out)
    with little_disk(13_000):
        assert ".gif (File too large)" in failing(*arguments, status=1)
    assert [name.rpartition(".")[2] for name in files(tmp_path / "out")] == ["h5"]


@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.ENOSPC, "free 5 MiB or more"), (errno.EDQUOT, "raise your quota")]
)
def test_what_is_to_be_freed_is_said(number, remedy, tmp_path, monkeypatch):
    """By the size of the file and the room that is left."""
    usage = namedtuple("usage", "free")(2**19)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)

    def full(file):
        file.truncate(5 * 2**20 + 10)
        raise OSError(number, os.strerror(number))

    with pytest.raises(NoRoomError, match=remedy) as error:
        replace_file(tmp_path / "file", full)
    assert str(error.value).startswith(f"no space left for {tmp_path / 'file'} ({os.strerror(number)})")
    assert files(tmp_path) == []


def test_hdf5_files_say_their_size_on_a_full_disk(tmp_path):
    with small_file_system(tmp_path / "disk") as disk:
        with pytest.raises(NoRoomError, match="free 5 MiB or more"), writing_hdf5(disk / "day.h5") as file:
            file["array"] = np.ones(9 * 2**20 - 2**16, np.uint8)  # of which 4 MiB find room
        assert files(disk) == []


def test_a_folder_that_cannot_be_written_to_is_said_first(tmp_path):
    """Before hours of computing."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"), writing_hdf5(tmp_path / "file" / "day.h5"):
        raise AssertionError("there was nowhere to write to")


# --- what killed processes leave


def killed_in_hdf5():
    at_call(h5py.Dataset, "__setitem__", 5, kill)


def test_what_a_killed_command_left_goes_with_the_next(run, cities, held_out, crevnet, tmp_path):
    arguments = command("data synth", tmp_path / "out", run, cities, held_out)
    assert end(start(arguments, tmp_path / "said", killed_in_hdf5)) == -signal.SIGKILL
    [left] = files(tmp_path / "out")
    assert left.endswith(".unfinished")
    crevnet(*arguments)
    assert files(tmp_path / "out") == ["20180101_100m_bins.h5"]


def test_what_a_living_process_writes_stays(tmp_path):
    """And what only looks like it."""
    theirs = tmp_path / "notes.unfinished"
    theirs.write_text("")
    with replacing(tmp_path / "file") as unfinished:
        unfinished.write_text("half")
        other = tmp_path / "other.1.unfinished"
        other.write_text("of a process that is gone")
        remove_unfinished(tmp_path)
        assert unfinished.exists() and not other.exists()
    assert files(tmp_path) == ["file", "notes.unfinished"]
