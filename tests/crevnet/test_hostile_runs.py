"""What may lie in a run's folder, in a configuration file or in a cache: refused in one line, or computed again, and nothing else
of the reader's touched."""

import os
import zipfile

import pytest
from apart import refused
from hostile_h5 import NO_FILES

from crevnet.folders import only_process
from crevnet.settings_error import SettingsError

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
