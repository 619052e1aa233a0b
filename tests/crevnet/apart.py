"""Runs a command in a forked process with limits, so that a hostile file can take neither the test's memory nor its time."""

import contextlib
import io
import os
import pickle
import resource
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crevnet.cli import main

MIB = 2**20


@dataclass
class Ended:
    """How a process ended: its result, what it printed, and what it took beyond what the test's process had."""

    result: Any
    out: str
    err: str
    seconds: float
    mebibytes: float


def apart(function: Callable[[], Any], seconds: int = 10, mebibytes: int = 500) -> Ended:
    """The result of a function, called in a child; an AssertionError if it takes more time or memory, or raises."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:  # the child: nothing of pytest may run in it
        signal.alarm(4 * seconds)
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (_pages(0) + 2 * mebibytes * MIB, hard))
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(pickle.dumps(_called(function)))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    status = os.waitpid(pid, 0)[1]
    assert answer, f"the process was killed by {signal.Signals(os.WTERMSIG(status)).name}"
    failure, ended = pickle.loads(answer)
    assert not failure, failure
    assert ended.seconds < seconds and ended.mebibytes < mebibytes, ended
    return ended


def run_apart(*arguments: object) -> tuple[int, Ended]:
    """The exit status of a command, and how it ended."""
    ended = apart(lambda: _status([str(argument) for argument in arguments]))
    return ended.result, ended


def refused(*arguments: object) -> str:
    """The one line of a command that has to fail."""
    status, ended = run_apart(*arguments)
    lines = [line for line in ended.err.splitlines() if not line.startswith("warning:")]
    assert status in (1, 2) and len(lines) == 1 and lines[0].startswith("crevnet: "), ended
    return lines[0]


def _called(function: Callable[[], Any]) -> tuple[str, Ended | None]:
    out, err = io.StringIO(), io.StringIO()
    before, begun = _pages(1), time.monotonic()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            result = function()
    except BaseException:
        return traceback.format_exc(), None
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return "", Ended(result, out.getvalue(), err.getvalue(), time.monotonic() - begun, (after - before) / MIB)


def _status(arguments: Sequence[str]) -> int:
    try:
        main(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def _pages(which: int) -> int:
    """Bytes of the process: of its address space (0), in memory (1)."""
    return int(Path("/proc/self/statm").read_text().split()[which]) * resource.getpagesize()
