"""A run's learning curves, from its TensorBoard logs."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of each picture that a resumed run replaces

_LOG_NAME = re.compile(r"(events\.out\.tfevents\.)(\d+)(\..*)")


@dataclass(frozen=True)
class Curve:
    """Logged values and their optimizer steps, both (n,) with n at least 1."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]


def learning_curves(run: Path) -> dict[str, Curve]:
    """Tag, such as train/loss, -> curve; empty if the run has no logs.

    If a run was resumed from an earlier step, only the last value of each step is returned. A file that ends within a record is
    read up to that record.
    """
    folder = run / "tensorboard"
    if not folder.is_dir():
        return {}
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 1})  # all scalars
    events.Reload()
    return {tag: _curve(events, tag) for tag in events.Tags()["scalars"]}


def date_logs_before(run: Path, second: int) -> None:
    """Rename the run's logs, in their order, so that the seconds in their names are before `second`.

    TensorBoard reads a folder's logs in the order of these seconds, and later values replace earlier ones of the same step. After
    a clock was set back, the logs of a resumed run would be read first and be hidden.
    """
    named = [
        (log, _LOG_NAME.fullmatch(log.name)) for log in sorted((run / "tensorboard").glob("events.out.tfevents.*"))
    ]
    later = []
    for log, name in reversed(named):
        if name is not None:
            if int(name[2]) >= second:
                later.append((log, f"{name[1]}{second - 1:010d}{name[3]}"))
            second = min(int(name[2]), second - 1)
    for log, earlier in reversed(later):  # the earliest first, since another one may need its name
        log.rename(log.with_name(earlier))


def _curve(events: EventAccumulator, tag: str) -> Curve:
    found = events.Scalars(tag)
    return Curve(np.array([event.step for event in found]), np.array([event.value for event in found]))
