"""Scores on the terminal: a table for each measure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from rich.table import Table

from crevnet.evaluation.metrics import SSIM_SIDE
from crevnet.evaluation.scores import Scores


class Column(NamedTuple):
    """How a measure is shown."""

    title: str
    format: str
    best: Callable[[Iterable[float]], float]
    missing: str | None = None
    """Why there may be none."""


SHOWN = {
    "mse": Column("MSE", ".3e", min),
    "mae": Column("MAE", ".3e", min),
    "psnr": Column("PSNR, dB", ".2f", max),
    "ssim": Column("SSIM", ".4f", max, f"nan: SSIM is of frames of at least {SSIM_SIDE} x {SSIM_SIDE} pixels"),
}


def score_tables(
    scores: Mapping[str, Scores], channels: Sequence[str], horizons: Sequence[str], has_roads: bool
) -> Iterator[Table]:
    """One of each measure: a row a forecast, the best one bold, and columns for the whole, each channel and each horizon.

    has_roads: the frames are a city's, and have an MSE on its roads.
    """
    for measure, (name, form, best, missing) in SHOWN.items():
        whole = [getattr(s, measure) for s in scores.values()]
        table = Table(caption=missing if any(map(math.isnan, whole)) else None, caption_justify="left")
        table.add_column("forecast")
        further = {}
        if measure == "mse":
            further["summed"] = [format(s.mse_summed, ".2f") for s in scores.values()]
            if has_roads:
                further["on roads"] = [format(s.mse_on_roads, form) for s in scores.values()]
        for column in (name, *further, *channels, *horizons):
            table.add_column(column, justify="right", no_wrap=True)
        found = best(value for value in whole if not math.isnan(value)) if not all(map(math.isnan, whole)) else None
        for number, ((forecast, s), value) in enumerate(zip(scores.items(), whole, strict=True)):
            by = (*getattr(s, f"{measure}_by_channel"), *getattr(s, f"{measure}_by_horizon"))
            others = [of_forecasts[number] for of_forecasts in further.values()]
            shown = (format(value, form), *others, *(format(v, form) for v in by))
            table.add_row(forecast, *shown, style="bold" if value == found else None)
        yield table
