"""Scores submissions by the competition's formula, and the naive baselines on the same test cases.

The naive baselines are clipped and rounded like a submission.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from crevnet.traffic4cast.checking import Submission
from crevnet.traffic4cast.forecasting import CaseForecast, submitted
from crevnet.traffic4cast.interface import Case, CaseFile, Challenge

HOURS = 24


@dataclass(frozen=True)
class CompetitionScores:
    """Mean squared errors in the competition's unit; `mse` is the score.

    Attributes:
        mse: the mean over all values.
        mse_by_channel: in the order of the protocol's channels.
        mse_by_horizon: in the order of the protocol's horizons.
        mse_by_hour: hour of day -> error of the frames predicted in it; hours without frames are missing.
    """

    mse: float
    mse_by_channel: tuple[float, ...]
    mse_by_horizon: tuple[float, ...]
    mse_by_hour: dict[int, float]


class ErrorTable:
    """Accumulates the errors of a city's predicted frames, in float64.

    All files of a city have the same number of cases and one frame size. The mean over all frames therefore equals the mean
    over the files' means.
    """

    def __init__(self, competition: Challenge) -> None:
        self._unit, self._horizons = competition.unit, np.array(competition.protocol.horizons)
        asked = len(self._horizons), len(competition.protocol.channels)
        self._errors = np.zeros((HOURS, *asked))  # sum over frames of each frame's mean error
        self._frames = np.zeros((HOURS, asked[0], 1))

    def add(self, case: Case, prediction: np.ndarray, truth: np.ndarray) -> None:
        """Add the errors of one case; `prediction` and `truth` are uint8 (P, H, W, C)."""
        error = np.square(prediction.astype(np.int32) - truth).mean((1, 2)) * self._unit
        hour = (case.first + self._horizons - 1) * HOURS // case.day.shape[0]
        row = np.arange(len(self._horizons))
        self._errors[hour, row] += error
        self._frames[hour, row] += 1

    def scores(self) -> CompetitionScores:
        errors, frames = self._errors, self._frames
        by_hour = errors.mean(2).sum(1)
        return CompetitionScores(
            mse=float(by_hour.sum() / frames.sum()),
            mse_by_channel=tuple((errors.sum((0, 1)) / frames.sum()).tolist()),
            mse_by_horizon=tuple((errors.mean(2).sum(0) / frames.sum((0, 2))).tolist()),
            mse_by_hour={h: float(by_hour[h] / frames[h].sum()) for h in range(HOURS) if frames[h].any()},
        )


def score_city(
    submissions: Mapping[str, Submission],
    files: Iterable[CaseFile],
    naive: Mapping[str, CaseForecast],
    competition: Challenge,
    progress: Callable[[int], None],
) -> dict[str, CompetitionScores]:
    """Scores of submissions without problems, and of naive baselines, on all files of one city.

    `progress` is called with the number of cases completed since the last call.
    """
    tables = {name: ErrorTable(competition) for name in (*submissions, *naive)}
    for file in files:
        with ExitStack() as opened:
            predicted = {name: opened.enter_context(given.open(file)) for name, given in submissions.items()}
            for index in range(file.shape[0]):
                case, truth = file.case(index), file.truth(index)
                for name, predictions in predicted.items():
                    tables[name].add(case, predictions[index], truth)
                for name, forecast in naive.items():
                    tables[name].add(case, submitted(forecast(case)), truth)
                progress(1)
    return {name: table.scores() for name, table in tables.items()}


def mean_competition_scores(by_city: Mapping[str, Mapping[str, CompetitionScores]]) -> dict[str, CompetitionScores]:
    """The mean over cities, as in the competition; for an hour, over the cities with predictions in it."""
    return {
        name: _mean_of_cities([scores[name] for scores in by_city.values()]) for name in next(iter(by_city.values()))
    }


def _mean_of_cities(cities: Sequence[CompetitionScores]) -> CompetitionScores:
    hours = sorted({hour for city in cities for hour in city.mse_by_hour})
    return CompetitionScores(
        mse=float(np.mean([city.mse for city in cities])),
        mse_by_channel=tuple(np.mean([city.mse_by_channel for city in cities], 0).tolist()),
        mse_by_horizon=tuple(np.mean([city.mse_by_horizon for city in cities], 0).tolist()),
        mse_by_hour={
            hour: float(np.mean([city.mse_by_hour[hour] for city in cities if hour in city.mse_by_hour]))
            for hour in hours
        },
    )
