"""bench/kit/page_cache.py, by the system's own account of the pages in memory."""

import mmap
import os

import pytest

from kit.page_cache import drop_from_cache, in_memory


def test_files_are_dropped_from_the_cache(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(100_000))
    if not drop_from_cache(path):
        pytest.skip("this system does not drop files from its cache")
    assert residency(path) == 0
    path.read_bytes()
    assert residency(path) > 0


def residency(path):
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as pages:
        return sum(in_memory(pages))


def test_false_if_a_file_stays_in_the_cache(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(bytes(100_000))
    monkeypatch.setattr(os, "posix_fadvise", lambda *_: None, raising=False)
    assert not drop_from_cache(path)
    monkeypatch.delattr(os, "posix_fadvise")
    assert not drop_from_cache(path)
