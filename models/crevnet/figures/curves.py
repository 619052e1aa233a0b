"""A run's learning curves, from what training has logged for TensorBoard."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

_LOG_NAME = re.compile(r"(events\.out\.tfevents\.)(\d+)(\..*)")


@dataclass(frozen=True)
class Curve:
    """Values against the optimizer's steps at which they were logged, both (n,), n at least 1."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]


def learning_curves(run: Path) -> dict[str, Curve]:
    """Every curve by its tag, train/loss say; none where the run has no logs.

    What a run has computed twice, since it was resumed from an earlier step, is there once, as it came last. A file that ends
    in the middle of a record is read up to there.
    """
    folder = run / "tensorboard"
    if not folder.is_dir():
        return {}
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 1})  # all scalars
    events.Reload()
    return {tag: _curve(events, tag) for tag in events.Tags()["scalars"]}


def date_logs_before(run: Path, second: int) -> None:
    """Rename the run's logs, in their order, for seconds before this one, if they are not.

    TensorBoard reads a folder's logs by the second in their names, and what comes later replaces what was computed twice: after a
    clock has gone back, the logs of a resumed run would come first, and be hidden.
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
    for log, earlier in reversed(later):  # the earliest first, whose name another one may take
        log.rename(log.with_name(earlier))


def _curve(events: EventAccumulator, tag: str) -> Curve:
    found = events.Scalars(tag)
    return Curve(np.array([event.step for event in found]), np.array([event.value for event in found]))
