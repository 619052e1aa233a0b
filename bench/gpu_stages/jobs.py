"""A stage's rows from jobs of which one may fail without the others."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from gpu_stages.stage import Row, Rows
from kit.device_memory import free, ran_out


@dataclass(frozen=True)
class Job:
    names: Row
    """Names of the measurement, with which its row begins if it fails."""
    work: Callable[[], Iterable[Row]]
    may_fail: bool = False
    """Whether it needs a compiler or another part that may be missing."""


def each(jobs: Iterable[Job]) -> Rows:
    """The rows of every job. One that fails leaves a row with a note; after the last, RuntimeError names the first failure.

    A job that runs out of memory is a result and not a failure.
    """
    failures: list[str] = []
    for job in jobs:
        try:
            yield from job.work()
        except Exception as error:
            traceback.print_exc()
            note = "out of memory" if ran_out(error) else first_line(error)
            if not (job.may_fail or ran_out(error)):
                failures.append(f"{', '.join(map(str, job.names.values()))}: {note}")
            yield {**job.names, "note": note}
        free()
    if failures:
        raise RuntimeError(f"{len(failures)} failed, the first: {failures[0]}")


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]
