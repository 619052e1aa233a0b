"""Processes that read data and die, and a machine without memory, shared memory or open files: one line, and no hang."""

import errno
import multiprocessing
import os
import resource
import signal
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import CANNOT_MOUNT, end, start, with_few_open_files, with_little_shared_memory
from torch.utils.data import get_worker_info
from torch.utils.data._utils import signal_handling

from crevnet import CrevNet
from crevnet.cli import main
from crevnet.data.windows import Windows

TOO_MUCH = 2**50  # bytes, which no machine has


@pytest.fixture
def in_worker(monkeypatch):
    """Do something in each worker, in front of its second window."""

    def begin(action):
        item, calls = Windows.__getitem__, []

        def watched(windows, index):
            if get_worker_info() is not None:
                calls.append(1)
            if len(calls) == 2:
                action()
            return item(windows, index)

        monkeypatch.setattr(Windows, "__getitem__", watched)
        # Lightning has taken PyTorch's handler away in this process, and without it a death is noticed after five seconds.
        monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)

    return begin


def commands(name, run, cities, small, out):
    """A command that reads data in two workers."""
    return {
        "fit": ("fit", "--data.root", cities, *small, "--data.workers=2", "--data.batch_size=1", "--out", out),
        "evaluate": ("evaluate", run, "--data.workers=2", "--data.batch_size=1"),
    }[name]


both = pytest.mark.parametrize("name", ["fit", "evaluate"])


@both
@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (
            signal.SIGKILL,
            ("a process that reads data has died (DataLoader worker", "--data.workers=0", "memory"),
        ),
        (signal.SIGBUS, ("(DataLoader worker", "shared memory", "--shm-size=8g", "--data.workers=0")),
    ],
)
def test_a_worker_that_is_killed(number, expected, name, run, cities, small, failing, in_worker, tmp_path):
    in_worker(lambda: os.kill(os.getpid(), number))
    line = failing(*commands(name, run, cities, small, tmp_path / "run"), status=1)
    assert [part for part in expected if part not in line] == [], line


@pytest.mark.parametrize("size", ["16k", "200k"])
def test_a_small_shared_memory(size, cities, small, tmp_path):
    """Too small for the semaphores of the workers; and for their batches, of which one takes 250 kB."""
    arguments = (
        "fit",
        "--data.root",
        cities,
        *small,
        "--data.workers=2",
        "--data.batch_size=14",
        "--out",
        tmp_path / "run",
    )
    status = end(start(arguments, tmp_path / "said", partial(with_little_shared_memory, size)))
    if status == CANNOT_MOUNT:
        pytest.skip("mounting is not allowed here")
    said = (tmp_path / "said").read_text()
    [line] = [line for line in said.splitlines() if line.startswith("crevnet: ")]
    assert "shared memory is too small" in line and "--shm-size=8g" in line and "--data.workers=0" in line
    assert status == 1 and "Traceback" not in said


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.EMFILE, "Too many open files"), ("too many open files ([Errno 24]", "ulimit -n")),
        (
            RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)"),
            ("shared memory is too small (unable to allocate", "--shm-size"),
        ),
    ],
)
def test_a_batch_that_a_worker_cannot_send(error, expected, run, cities, small, failing, monkeypatch, tmp_path):
    """Python's queue would drop it, and the command would wait for it without end."""

    def fails(tensor):
        raise error

    monkeypatch.setitem(ForkingPickler._extra_reducers, torch.Tensor, fails)
    line = failing(*commands("evaluate", run, cities, small, tmp_path / "run"), status=1)
    assert [part for part in expected if part not in line] == [], line


# --- open files


def test_too_few_open_files(cities, small, tmp_path):
    arguments = commands("fit", None, cities, small, tmp_path / "run")
    assert end(start(arguments, tmp_path / "said", partial(with_few_open_files, 80))) == 2
    [line] = (tmp_path / "said").read_text().splitlines()
    assert (
        line.startswith("crevnet: --data.workers 2 requires ") and "but the system allows 80: raise the limit" in line
    )


def test_a_limit_of_open_files_that_can_be_raised_is_raised(run, crevnet, cities, small):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 20, hard))
    try:
        crevnet(*commands("evaluate", run, cities, small, None))
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# --- memory


@pytest.mark.parametrize(
    ("allocate", "cause"),
    [
        (lambda: torch.empty(TOO_MUCH, dtype=torch.uint8), "can't allocate memory: you tried to allocate"),
        (lambda: np.empty(TOO_MUCH, np.uint8), "Unable to allocate 1.00 PiB"),
        (lambda: bytearray(TOO_MUCH), "out of memory"),
    ],
)
class TestMemory:
    def test_in_training(self, allocate, cause, cities, small, failing, monkeypatch, tmp_path):
        monkeypatch.setattr(CrevNet, "loss", lambda *_: allocate())
        arguments = ("fit", "--data.root", cities, *small, "--data.batch_size=3", "--out", tmp_path / "run")
        line = failing(*arguments, status=1)
        assert "out of memory" in line and cause in line and "lower --data.batch_size (it is 3)" in line
        assert "no checkpoint has been written yet" in line

    def test_in_another_command(self, allocate, cause, run, failing, monkeypatch, tmp_path):
        monkeypatch.setattr(CrevNet, "generate", lambda *_: allocate())
        line = failing("predict", run, "--out", tmp_path, status=1)
        assert "out of memory" in line and cause in line and "lower --data.batch_size" in line

    def test_in_a_worker(self, allocate, cause, run, cities, small, failing, in_worker, tmp_path):
        others = multiprocessing.active_children()  # processes of earlier tests
        in_worker(allocate)
        line = failing(*commands("evaluate", run, cities, small, tmp_path / "run"), status=1)
        assert "out of memory" in line and "lower --data.batch_size or --data.workers" in line
        assert {*multiprocessing.active_children()} <= {*others}  # the other worker has ended too


def test_a_limit_on_memory(run, failing, monkeypatch, tmp_path):
    """Of the system's: the process may grow by 100 MB, and needs 1 GB."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    monkeypatch.setattr(CrevNet, "generate", lambda *_: torch.zeros(2**28))
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 10**8, limits[1]))
    try:
        line = failing("predict", run, "--out", tmp_path, status=1)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert "out of memory (DefaultCPUAllocator: can't allocate memory" in line


def test_other_errors_keep_their_traceback(run, monkeypatch, tmp_path):
    def fails(*_):
        raise RuntimeError("a mistake")

    monkeypatch.setattr(CrevNet, "generate", fails)
    with pytest.raises(RuntimeError, match="a mistake"):
        main(["predict", str(run), "--out", str(tmp_path)])
