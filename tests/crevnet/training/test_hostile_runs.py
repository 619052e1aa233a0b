"""What may lie in a run's folder, in a configuration file or in a cache: refused in one line, or computed again, and nothing else
of the reader's touched."""

import os
import shutil
import zipfile
from itertools import pairwise

import numpy as np
import pytest
import torch
from apart import apart, refused
from hostile_h5 import NO_FILES

from crevnet.data.files.days import open_days
from crevnet.data.maps.cache import write_cached
from crevnet.data.maps.road_map import cached_road_map
from crevnet.data.maps.slot_means import slot_means
from crevnet.machine.errors import SettingsError
from crevnet.machine.folders import only_process

# --- the lock


def test_a_lock_that_is_a_link_leaves_what_it_leads_to(tmp_path, failing, cities):
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    lock = tmp_path / "run" / "training.lock"
    lock.parent.mkdir()
    lock.symlink_to(mine)
    line = failing("fit", "--data.root", cities, "--out", lock.parent)
    assert f"{lock} is a symbolic link, expected the lock of a training run, a regular file: remove it" in line
    assert mine.read_text() == "mine" and lock.is_symlink()
    mine.unlink()
    failing("fit", "--data.root", cities, "--out", lock.parent)
    assert not mine.exists()  # nor is it made


def test_a_lock_that_is_another_file_is_not_emptied(tmp_path):
    """A hard link to it, which cannot be told from a lock."""
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    os.link(mine, tmp_path / "training.lock")
    with only_process(tmp_path):
        pass
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("kind", [*NO_FILES, os.mkdir], ids=lambda kind: kind.__name__)
def test_a_lock_that_is_no_file(kind, tmp_path):
    kind(tmp_path / "training.lock")
    with pytest.raises(
        SettingsError, match=r"training\.lock is (no regular file|a symbolic link), expected .* remove it"
    ):
        only_process(tmp_path).__enter__()


# --- checkpoints


def flip(path, name):
    """Flip a bit in the middle of a zip's entry."""
    with zipfile.ZipFile(path) as archive:
        content = archive.read(name)
        whole = bytearray(path.read_bytes())
        start = whole.index(content, archive.getinfo(name).header_offset)
    whole[start + len(content) // 2] ^= 0x20
    path.write_bytes(whole)


@pytest.mark.parametrize("part", ["data.pkl", "data/0", "data/7"])
@pytest.mark.parametrize("which", ["best", "last"])
def test_a_checkpoint_of_which_a_bit_has_flipped(part, which, own_run, failing):
    path = own_run / "checkpoints" / f"{which}.ckpt"
    flip(path, entry_named(path, part))
    other = "last.ckpt" if which == "best" else "best.ckpt"
    command = ("evaluate", own_run) if which == "best" else ("fit", "--resume", own_run, "--training.epochs", "2")
    line = failing(*command)
    assert f"{path} is no readable checkpoint (it is damaged: the checksum of " in line
    assert f"copy {other} over it, or train again" in line


def entry_named(path, part):
    with zipfile.ZipFile(path) as archive:
        return next(name for name in archive.namelist() if name.endswith(f"/{part}"))


def test_a_checkpoint_whose_parts_are_packed(own_run):
    """PyTorch would unpack any number of zeros."""
    path = own_run / "checkpoints" / "best.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("best/data/0", "w") as file:
        for _ in range(50):
            file.write(bytes(2**20))
    line = refused("evaluate", own_run)
    assert f"{path} is no readable checkpoint (its parts are packed, expected what crevnet fit wrote)" in line


def test_a_checkpoint_that_is_no_zip(own_run, failing):
    path = own_run / "checkpoints" / "best.ckpt"
    path.write_bytes(b"\x80\x02}q\x00.")
    assert f"{path} is no readable checkpoint (it is damaged: File is not a zip file)" in failing("evaluate", own_run)


# --- configuration files and lists

GROWING = "a: &a [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in pairwise("abcdefghi")
)
YAML = {
    "aliases that grow": (GROWING, "more than 10000 values"),
    "an alias of itself": ("data: &a\n  cities: *a\n", "the alias *a names nothing before it"),
    "thousands of levels": ("data: " + "[" * 5000 + "]" * 5000, "more than 50 levels"),
    "levels by indentation": ("\n".join(" " * level + "a:" for level in range(200)), "more than 50 levels"),
    "megabytes": ("#" * 2**21, "more than 1048576 bytes"),
    "no text": ("\x00\x01", "unacceptable character"),
}


@pytest.mark.parametrize("kind", YAML)
def test_configuration_files(kind, own_run, tmp_path):
    content, said = YAML[kind]
    path = tmp_path / "some.yaml"
    path.write_text(content)
    line = refused("fit", "--config", path, "--out", tmp_path / "run")
    assert str(path) in line and said in line
    line = refused("fit", "--data", path, "--out", tmp_path / "run")
    assert said in line
    (own_run / "config.yaml").write_text(content)
    line = refused("show", own_run)
    assert str(own_run / "config.yaml") in line and said in line


@pytest.mark.parametrize("kind", NO_FILES, ids=lambda kind: kind.__name__)
def test_pipes_and_devices_in_the_place_of_files_of_values(kind, own_run, tmp_path):
    path = tmp_path / "values"
    kind(path)
    said = NO_FILES[kind].partition(",")[0]
    for option in ("--config", "--data", "--data.training_dates"):
        for written in ((option, path), (f"{option}={path}",)):
            line = refused("fit", *written, "--out", tmp_path / "run")
            assert str(path) in line and said in line
    config = own_run / "config.yaml"
    config.unlink()
    kind(config)
    line = refused("show", own_run)
    assert f"{own_run} is no run's folder, it has no config.yaml" in line


def test_aliases_that_do_not_grow(tmp_path, failing):
    """They save writing a value twice."""
    path = tmp_path / "some.yaml"
    path.write_text("data:\n  batch_size: &two 2\n  workers: *two\n  root: absent\n")
    assert "absent cannot be listed" in failing("fit", "--config", path, "--out", tmp_path / "run")


@pytest.mark.parametrize("content", ["score: [", "- 1", "score: text", GROWING])
def test_a_score_of_a_recipe_that_is_none(content, own_run, tmp_path, failing):
    recipe = tmp_path / "recipe"
    shutil.move(own_run, recipe / "base")
    (recipe / "recipe.yaml").write_text("")
    (recipe / "base" / "finished.yaml").write_text(content)
    line = failing("show", recipe)
    assert f"{recipe / 'base' / 'finished.yaml'} has no score (" in line and "remove it" in line


# --- caches


def saved(path, array):
    with path.open("wb") as file:  # np.save would add a suffix
        np.save(file, array)


def changed(path, array):
    """Another value, and nothing else."""
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)


def with_checksum(path, array):
    write_cached(path, [array], array.shape)


def huge_header(path, array):
    saved(path, array)
    content = path.read_bytes()
    path.write_bytes(content.replace(str(array.shape).encode(), b"(10000000000000,)", 1))


CACHES = {
    "NaN": lambda path, array: with_checksum(path, np.full_like(array, np.nan)),
    "below 0": lambda path, array: with_checksum(path, array - 1),
    "above 1": lambda path, array: with_checksum(path, array + 1),
    "another value": changed,
    "foreign values": lambda path, array: saved(path, np.full_like(array, 0.125)),
    "another shape": lambda path, array: with_checksum(path, array[:, :1]),
    "the same values in another shape": lambda path, array: with_checksum(path, array.reshape(array.shape[::-1])),
    "another dtype": lambda path, array: with_checksum(path, array.astype(np.float64)),
    "objects": lambda path, array: path.write_bytes(b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'shape': (1,), }"),
    "a huge header": huge_header,
    "a pipe": lambda path, array: (path.unlink(), os.mkfifo(path)),
    "a device": lambda path, array: (path.unlink(), path.symlink_to("/dev/zero")),
}


@pytest.mark.parametrize("section", ["data", "model", "training"])
@pytest.mark.parametrize("kind", NO_FILES, ids=lambda kind: kind.__name__)
def test_pipes_and_devices_in_the_place_of_a_section(kind, section, tmp_path):
    kind(tmp_path / "pipe")
    (tmp_path / "some.yaml").write_text(f"{section}: {tmp_path / 'pipe'}\n")
    line = refused("fit", "--config", tmp_path / "some.yaml", "--out", tmp_path / "run")
    assert str(tmp_path / "pipe") in line and "expected a regular file" in line


@pytest.mark.parametrize("kind", CACHES)
def test_caches_that_are_not_as_they_were_written(kind, own_cities, tmp_path, monkeypatch):
    monkeypatch.setenv("CREVNET_CACHE", str(tmp_path / "cache"))
    days = open_days(own_cities, cities=["There"])

    def computed():
        return cached_road_map(days), slot_means(days)["There"].frames(0, 20)

    before = computed()
    for path in (tmp_path / "cache").rglob("*.npy"):
        CACHES[kind](path, np.load(path))
    for expected, found in zip(before, apart(computed).result, strict=True):
        assert torch.equal(expected, found)
    assert all(path.is_file() and not path.is_symlink() for path in (tmp_path / "cache").rglob("*.npy"))
