"""Files rewritten for training: the same bytes, whatever happens on the way."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import days_2021
import h5py
import numpy as np
import pytest
import torch

from crevnet.data.errors import DataError
from crevnet.data.files.days import open_days
from crevnet.data.files.layouts import layout_named
from crevnet.data.made.repack import repack
from crevnet.data.windows import Windows
from crevnet.machine.files import NoRoomError

hdf5plugin = pytest.importorskip("hdf5plugin")
ROOT = Path(__file__).parents[3]
OWN = ("repacked_from", "chunk_index")
"""Attributes that repacking adds."""


def contents(root):
    """Name of each file -> its datasets, with dtypes and attributes."""
    found = {}
    for path in sorted(root.rglob("*.h5")):
        with h5py.File(path) as file:
            found[path.relative_to(root)] = {
                name: (
                    item.dtype,
                    item[()].tobytes(),
                    {k: v for k, v in item.attrs.items() if k not in ("repacked_from", "chunk_index")},
                )
                for name, item in file.items()
            }
    return found


@pytest.fixture
def source(cities_2021):
    """Days of 2021 with h5py's own chunks, one with 80 slots; a static file, attributes, a second dataset, no frames."""
    day = np.random.default_rng(0).integers(-300, 300, (80, 21, 14, 8)).astype(np.int16)
    path = days_2021.write_day(cities_2021, day, "BERLIN", "2019-01-03")
    with h5py.File(path, "r+") as file:
        file["array"].attrs["synthetic_city"] = "none"
        file["more"] = np.arange(3.0)
    movie = np.random.default_rng(0).normal(size=(5, 3, 4, 1))
    movie[2] = np.nan
    with h5py.File(cities_2021 / "movie.h5", "w") as file:
        file.create_dataset("frames", data=movie, compression="gzip")
    with h5py.File(cities_2021 / "empty.h5", "w") as file:
        file["frames"] = movie[:0]
    (cities_2021 / "notes.txt").write_text("no HDF5 file")
    return cities_2021


def test_the_same_frames_one_a_chunk(source, tmp_path):
    target, shares = tmp_path / "packed", []
    paths = repack(source, target, shares.append)
    assert contents(target) == contents(source) and len(paths) == len(contents(source)) == 11
    assert shares == sorted(shares) and shares[-1] == 1
    assert sorted(path for path in target.rglob("*") if path.is_file()) == sorted(paths)  # nothing partial stays
    for path in paths:
        with h5py.File(path) as file:
            [first, *_] = file.values()
            if first.ndim == 4 and len(first):
                assert first.chunks == (1, *first.shape[1:]) and str(hdf5plugin.Zstd.filter_id) in first._filters


def test_windows_of_packed_days_are_the_same(source, tmp_path):
    (source / "BERLIN" / "training" / "2019-01-03_BERLIN_8ch.h5").unlink()
    repack(source, tmp_path / "packed")
    layout = layout_named("2021")
    for one, other in zip(
        Windows(open_days(source, layout=layout), 9, stride=7),
        Windows(open_days(tmp_path / "packed", layout=layout), 9, stride=7),
        strict=True,
    ):
        assert torch.equal(one["frames"], other["frames"])


def test_repeating_keeps_what_is_there(source, tmp_path):
    paths = repack(source, tmp_path / "packed")
    before = {path: path.stat().st_mtime_ns for path in paths}
    assert repack(source, tmp_path / "packed") == paths
    assert {path: path.stat().st_mtime_ns for path in paths} == before


def run(code, *arguments):
    """A program of its own; its exit status and what it said on stderr."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'models'}"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def test_killed_in_the_middle_of_a_file(source, tmp_path):
    target = tmp_path / "packed"
    code = """
import os, signal, sys
from pathlib import Path
from crevnet.data.files import hdf5_writing
from crevnet.data.made.repack import repack
class Killed(bytes):
    def __getitem__(self, rest):
        os.kill(os.getpid(), signal.SIGKILL)
written = []
def half_of_the_third(image):
    written.append(1)
    return memoryview(image) if len(written) < 3 else Killed(image[: len(image) // 2])
hdf5_writing.memoryview = half_of_the_third
repack(Path(sys.argv[1]), Path(sys.argv[2]))
"""
    assert run(code, source, target)[0] == -signal.SIGKILL
    [partial] = (target / "ANTWERP" / "training").glob("2019-01-03_ANTWERP_8ch.h5.*.unfinished")
    expected, finished = contents(source), contents(target)
    assert partial.stat().st_size > 10_000 and len(finished) == 3
    assert finished == {name: expected[name] for name in finished}
    before = {name: (target / name).stat().st_mtime_ns for name in finished}
    repack(source, target)
    assert contents(target) == expected and not partial.exists()
    assert {name: (target / name).stat().st_mtime_ns for name in finished} == before


def days(target):
    """All that is there beside static files, finished or not."""
    return [path for path in target.rglob("*") if path.is_file() and "static" not in path.name]


def test_what_is_written_is_compared(source, tmp_path, monkeypatch):
    set_item = h5py.Dataset.__setitem__
    monkeypatch.setattr(h5py.Dataset, "__setitem__", lambda item, place, values: set_item(item, place, values * 0))
    with pytest.raises(DataError, match="does not contain the values written"):
        repack(source, tmp_path / "packed")
    assert not days(tmp_path / "packed")


def test_a_full_disk(source, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, limits[1]))  # a day takes some 72,000 bytes
    try:
        with pytest.raises(NoRoomError, match=r"no space left for .*2019-01-01_ANTWERP_8ch.h5 .*ulimit") as error:
            repack(source, tmp_path / "packed")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "packed" in str(error.value) and "\n" not in str(error.value)
    assert not days(tmp_path / "packed")
    repack(source, tmp_path / "packed")
    assert contents(tmp_path / "packed") == contents(source)


def test_a_damaged_file_is_named_and_finished_ones_stay(source, tmp_path):
    expected = contents(source)
    path = source / "BERLIN" / "training" / "2019-01-01_BERLIN_8ch.h5"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match=f"{path} cannot be read .*truncated"):
        repack(source, tmp_path / "packed")
    found = contents(tmp_path / "packed")
    assert len(days(tmp_path / "packed")) == 4 and found == {name: expected[name] for name in found}  # ANTWERP's


def another_file(source, target):
    (target / "BERLIN" / "training").mkdir(parents=True)
    with h5py.File(target / "BERLIN" / "training" / "2019-01-02_BERLIN_8ch.h5", "w") as file:
        file["array"] = np.zeros(3)
    return "2019-01-02_BERLIN_8ch.h5 exists"


def another_source(source, target):
    repack(source, target)
    path = source / "BERLIN" / "training" / "2019-01-02_BERLIN_8ch.h5"
    os.utime(path, (1, 1))
    return "2019-01-02_BERLIN_8ch.h5 exists"


def another_static_file(source, target):
    (target / "BERLIN").mkdir(parents=True)
    with h5py.File(target / "BERLIN" / "BERLIN_static.h5", "w") as file:
        file["array"] = days_2021.static(7)
    return "BERLIN_static.h5 exists"


@pytest.mark.parametrize("make", [another_file, another_source, another_static_file])
def test_nothing_is_overwritten(make, source, failing, tmp_path):
    target = tmp_path / "packed"
    named = make(source, target)
    before = {path: path.read_bytes() for path in target.rglob("*.h5")}
    line = failing("data", "repack", source, target)
    assert named in line and "move it away" in line
    assert {path: content for path, content in before.items() if path.read_bytes() != content} == {}


def test_the_command(source, crevnet, failing, tmp_path):
    said = crevnet("data", "repack", source, tmp_path / "packed")
    assert "packed holds 11 files" in said and f"next: crevnet fit --data.root {tmp_path / 'packed'}" in said
    assert "lies within" in failing("data", "repack", source, source / "packed")
    assert "lies within" in failing("data", "repack", source, source)
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in failing("data", "repack", tmp_path / "empty", tmp_path / "more")
    assert "cannot be listed" in failing("data", "repack", tmp_path / "absent", tmp_path / "more")
    (tmp_path / "file").write_text("")
    assert f"{tmp_path / 'file'}" in failing("data", "repack", source, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "" and not (tmp_path / "more").exists()


def test_without_the_plugin(source, tmp_path, monkeypatch):
    """Reading, in a program of its own: what is loaded here stays loaded."""
    repack(source, tmp_path / "packed")
    path = tmp_path / "packed" / "BERLIN" / "training" / "2019-01-01_BERLIN_8ch.h5"
    read = "import sys; from pathlib import Path; from crevnet.data.files.days import open_day; open_day(Path(sys.argv[1]))"
    status, said = run(f"import sys; sys.modules['hdf5plugin'] = None; {read}", path)
    last = said.splitlines()[-1]
    assert status == 1 and f"DataError: {path} is compressed with" in last and "pip install hdf5plugin" in last
    monkeypatch.setitem(sys.modules, "hdf5plugin", None)
    with pytest.raises(DataError, match="repacking requires the package hdf5plugin: pip install hdf5plugin"):
        repack(source, tmp_path / "more")
