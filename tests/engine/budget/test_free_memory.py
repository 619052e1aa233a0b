"""revflow.free_memory: what a process can still allocate, below the limits of the process and of its container."""

from pathlib import Path

import pytest
import torch

import revflow

GIB = 2**30


@pytest.fixture
def files(monkeypatch):
    """The content of Linux's files, by path; other files do not exist."""
    found = {"/proc/meminfo": "MemTotal: 9999 kB\nMemAvailable: 8388608 kB\n"}

    def read(path, encoding):
        if str(path) not in found:
            raise FileNotFoundError(path)
        return found[str(path)]

    monkeypatch.setattr(Path, "read_text", read)
    return found


def test_of_a_machine(files):
    assert revflow.free_memory("cpu") == revflow.free_memory(torch.device("cpu")) == 8 * GIB


@pytest.mark.parametrize(("limit", "free"), [("max\n", 8 * GIB), (f"{4 * GIB}\n", 3 * GIB), (f"{32 * GIB}\n", 8 * GIB)])
def test_in_a_container(files, limit, free):
    """The cache of files counts as used there, but Linux frees it."""
    files["/sys/fs/cgroup/memory.max"], files["/sys/fs/cgroup/memory.current"] = limit, f"{2 * GIB}\n"
    files["/sys/fs/cgroup/memory.stat"] = f"anon 5\ninactive_file {GIB}\nactive_file 77\n"
    assert revflow.free_memory("cpu") == free


def test_of_an_unknown_system(files):
    files.clear()
    with pytest.raises(RuntimeError, match="cannot be determined for the device cpu"):
        revflow.free_memory("cpu")
    with pytest.raises(RuntimeError, match="cannot be determined for the device meta"):
        revflow.free_memory("meta")


@pytest.mark.parametrize(("fraction", "free"), [(1.0, 9), (0.5, 6)])
def test_of_a_gpu(monkeypatch, fraction, free):
    """Of 16 GiB, others take 5, this process 2, and the cache of its allocator 1."""
    answers = {
        "is_available": True,
        "memory_allocated": 2 * GIB,
        "memory_reserved": 3 * GIB,
        "mem_get_info": (8 * GIB, 16 * GIB),
        "get_per_process_memory_fraction": fraction,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer, raising=False)
    assert revflow.free_memory("cuda") == free * GIB
    monkeypatch.delattr(torch.cuda, "get_per_process_memory_fraction")
    assert revflow.free_memory("cuda") == 9 * GIB
