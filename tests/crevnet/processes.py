"""Commands in processes of their own, to be killed; and what happens to them at a chosen moment.

A process is forked from a server that has imported everything, and so begins at once.
"""

import ctypes
import io
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tensorboard.summary.writer.record_writer import RecordWriter

from crevnet import CrevNet
from crevnet.cli import main
from crevnet.data.errors import DataError

os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # of pytest's the server would know nothing, and import nothing
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["crevnet.training.trainer", "crevnet.evaluation.comparison"])


def nothing() -> None:
    """What happens in a process that nobody disturbs."""


def start(arguments, output: Path, before: Callable[[], None] = nothing):
    """Begin `crevnet ARGUMENTS`, after `before`, with all that it prints in a file. Returns the process."""
    process = _context.Process(target=_command, args=([str(a) for a in arguments], output, before))
    process.start()
    return process


def end(process) -> int:
    """The exit status, negative for a signal's number."""
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def _command(arguments: list[str], output: Path, before: Callable[[], None]) -> None:
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell ignores for what it runs in the background
    before()
    main(arguments)


def at_call(owner, name: str, number: int | None, action: Callable[[], object]) -> None:
    """Do something in front of one call of a function, or of each."""
    function, calls = getattr(owner, name), []

    def watched(*arguments, **options):
        calls.append(1)
        if number in (None, len(calls)):
            action()
        return function(*arguments, **options)

    setattr(owner, name, watched)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_in_step(number: int) -> None:
    """With curves that TensorBoard's thread has not written yet, if nobody has asked for them (Lightning does, each step)."""
    asked = threading.Event()
    at_call(EventFileWriter, "add_event", None, asked.clear)
    at_call(EventFileWriter, "flush", None, asked.set)
    at_call(RecordWriter, "write", None, partial(asked.wait, 2))
    at_call(CrevNet, "loss", number, kill)


def waiting_in_step(number: int) -> None:
    """Until it is killed. This process's own server would keep those alive that read data."""
    with_forked_workers()
    at_call(CrevNet, "loss", number, signal.pause)


def killed_in_validation(number: int) -> None:
    at_call(CrevNet, "generate", number, kill)


def killed_in_optimizer(number: int) -> None:
    at_call(torch, "_fused_adam_", number, kill)


def killed_in_write(number: int) -> None:
    """With half of a checkpoint in its file."""
    save, calls = torch.save, []

    def half(checkpoint, file):
        calls.append(1)
        if len(calls) < number:
            return save(checkpoint, file)
        content = io.BytesIO()
        save(checkpoint, content)
        file.write(content.getvalue()[: len(content.getvalue()) // 2])
        file.flush()
        kill()

    torch.save = half


def killed_before_replacing(number: int) -> None:
    """With the whole checkpoint beside the one that it would replace; the first file that is replaced is config.yaml."""
    at_call(os, "replace", number + 1, kill)


def sent(number: int, what: signal.Signals, to_group: bool = False) -> None:
    """A signal in the `number`-th step; to the processes that read data too, as a terminal or a scheduler does."""
    os.setpgrp()
    send = partial(os.killpg, 0, what) if to_group else partial(os.kill, os.getpid(), what)
    at_call(CrevNet, "loss", number, send)


def workers_killed(number: int) -> None:
    at_call(CrevNet, "loss", number, lambda: [worker.kill() for worker in multiprocessing.active_children()])


def with_little_disk(size: int) -> None:
    """No file grows beyond `size` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def with_little_disk_from(number: int, size: int) -> None:
    at_call(CrevNet, "loss", number, partial(with_little_disk, size))


CANNOT_MOUNT = 77


def with_little_shared_memory(size: str) -> None:
    """As in a container: a /dev/shm of this process and its workers alone. Ends with CANNOT_MOUNT where that is not allowed."""
    own_mounts = 0x20000  # CLONE_NEWNS
    commands = (["mount", "--make-rprivate", "/"], ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", "/dev/shm"])
    if ctypes.CDLL(None).unshare(own_mounts) or any(subprocess.run(command).returncode for command in commands):
        os._exit(CANNOT_MOUNT)
    with_forked_workers()


def with_few_open_files(limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    with_forked_workers()


def with_forked_workers() -> None:
    """As in a command that a shell has started: this process's own server of processes has another view of the machine."""
    multiprocessing.set_start_method("fork", force=True)


def everything_wrong(number: int, size: int) -> None:
    def action():
        with_little_disk(size)
        raise DataError("a file is damaged")

    at_call(CrevNet, "loss", number, action)
