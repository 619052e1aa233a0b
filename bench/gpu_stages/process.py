"""Runs a stage in a process of its own, stops it with all of its children at its limit, and reads its rows.

The process appends each row to a journal as soon as it has one, a line of JSON per row. The rows of a stage that is stopped, is
killed or crashes are therefore not lost.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import signal
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from gpu_stages.stage import Row, Setup, SkipError, Stage

LINES = 15
"""Number of lines of a traceback or a log that an outcome stores."""
WIDTH = 300
"""Number of characters of such a line."""


@dataclass
class Outcome:
    """The results of a stage."""

    stage: str
    title: str
    status: str
    """ok, failed, out of memory, out of time or skipped."""
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)
    error: str = ""
    """The reason, if the status is not ok: one line."""
    about: str = ""
    """Hardware and versions."""
    traceback: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    """The last lines that a stage that is not ok has printed."""

    @property
    def is_fine(self) -> bool:
        return self.status in ("ok", "skipped")

    def __str__(self) -> str:
        reason = f": {self.error}" if self.error else ""
        return f"{self.stage}: {self.status}, {self.seconds:.0f} s, {len(self.rows)} rows{reason}"


def run(stage: Stage, setup: Setup) -> Outcome:
    limit = setup.seconds_left
    if limit <= 0:
        return Outcome(stage.name, stage.title, "out of time", error="no time was left")
    began = time.monotonic()
    journal, log = setup.work / f"{stage.name}.jsonl", setup.out / f"{stage.name}.log"
    process = get_context("spawn").Process(target=_work, args=(stage.function, setup, journal, log))
    process.start()
    try:
        process.join(limit)
        is_late = process.is_alive()
    finally:
        _end(process)
    outcome = _read(stage, journal, process.exitcode)
    outcome.seconds = round(time.monotonic() - began, 1)
    if is_late and outcome.status != "ok":
        outcome.status, outcome.error = "out of time", f"stopped at its limit of {limit:.0f} s"
    if outcome.status not in ("ok", "skipped"):
        outcome.log = _last_lines(log)
    return outcome


def _end(process: BaseProcess) -> None:
    """Kill the process with its children: workers that read data, pytest, compilers."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid or 0, signal.SIGKILL)
    if process.is_alive():
        process.kill()  # it has not come to make its group
    process.join()


def _read(stage: Stage, journal: Path, code: int | None) -> Outcome:
    entries: dict[str, list[Any]] = {"about": [""], "row": [], "end": []}
    for line in journal.read_text(encoding="utf-8").splitlines() if journal.is_file() else ():
        with suppress(ValueError):  # the last line of a process that was killed as it wrote it
            for kind, entry in json.loads(line).items():
                entries[kind].append(entry)
    ended = code is not None and code < 0
    reason = f"ended by {signal.Signals(-code).name}" if ended else f"ended with exit status {code}"  # type: ignore[operator]
    end = entries["end"][-1] if entries["end"] else {"status": "failed", "error": f"its process {reason}"}
    outcome = Outcome(stage.name, stage.title, rows=entries["row"], about=entries["about"][-1], **end)
    if outcome.status == "ok" and not outcome.rows:
        outcome.status, outcome.error = "failed", "it has left no rows"
    return outcome


def _last_lines(log: Path) -> list[str]:
    if not log.is_file():
        return []
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line[:WIDTH] for line in lines[-LINES:]]


def _work(function: str, setup: Setup, journal: Path, log: Path) -> None:
    """In the stage's process."""
    os.setsid()
    _print_to(log)
    tempfile.tempdir = os.environ["TMPDIR"] = str(setup.work)
    os.environ["CREVNET_CACHE"] = str(setup.work / "cache")
    with journal.open("w", encoding="utf-8") as file:

        def write(kind: str, entry: object) -> None:
            file.write(json.dumps({kind: _in_json(entry)}, default=str) + "\n")
            file.flush()

        try:
            write("about", _about(setup))
            module, name = function.split(":")
            for row in getattr(import_module(module), name)(setup):
                write("row", row)
            write("end", {"status": "ok"})
        except Exception as error:
            traceback.print_exc()
            write("end", _end_of(error))


def _print_to(log: Path) -> None:
    """Whatever is printed, by libraries and children too, goes to a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    for number in (1, 2):
        os.dup2(descriptor, number)
    os.close(descriptor)
    faulthandler.enable(file=2)


def _about(setup: Setup) -> str:
    import torch

    from pages import report

    device = torch.device(setup.device)
    packages = "lightning", "h5py", "numpy", "triton", "memcnn", "revtorch", "revlib"
    about = report.machine(device, torch.get_num_threads(), packages)
    if device.type == "cuda":
        gibibytes = torch.cuda.get_device_properties(device).total_memory / 2**30
        cudnn = torch.backends.cudnn.version()
        about += f", CUDA {torch.version.cuda}, cuDNN {cudnn}, {gibibytes:.0f} GiB"
    return f"{about}, {os.cpu_count()} CPU cores"


def _end_of(error: Exception) -> dict[str, Any]:
    if isinstance(error, SkipError):
        return {"status": "skipped", "error": str(error)}
    from kit.device_memory import ran_out

    status = "out of memory" if ran_out(error) else "failed"
    first = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return {"status": status, "error": first, "traceback": traceback.format_exc().splitlines()[-LINES:]}


def _in_json(value: Any) -> Any:
    """Null for a number that is not finite."""
    if isinstance(value, dict):
        return {name: _in_json(v) for name, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
