"""Scores on the terminal: a table for each measure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from rich.table import Table

from crevnet.evaluation import Scores


class Column(NamedTuple):
    """How a measure is shown."""

    title: str
    format: str
    best: Callable[[Iterable[float]], float]


SHOWN = {
    "mse": Column("MSE", ".3e", min),
    "mae": Column("MAE", ".3e", min),
    "psnr": Column("PSNR, dB", ".2f", max),
    "ssim": Column("SSIM", ".4f", max),
}


def score_tables(scores: Mapping[str, Scores], channels: Sequence[str], horizons: Sequence[str]) -> Iterator[Table]:
    """One of each measure: a row a forecast, the best one bold, and columns for the whole, each channel and each horizon."""
    for measure, (name, form, best) in SHOWN.items():
        table = Table()
        table.add_column("forecast")
        further = ["summed", "on roads"] if measure == "mse" else []
        for column in (name, *further, *channels, *horizons):
            table.add_column(column, justify="right", no_wrap=True)
        whole = [getattr(s, measure) for s in scores.values()]
        found = best(value for value in whole if not math.isnan(value)) if not all(map(math.isnan, whole)) else None
        for (forecast, s), value in zip(scores.items(), whole, strict=True):
            by = (*getattr(s, f"{measure}_by_channel"), *getattr(s, f"{measure}_by_horizon"))
            others = [format(s.mse_summed, ".2f"), format(s.mse_on_roads, form)] if further else []
            shown = (format(value, form), *others, *(format(v, form) for v in by))
            table.add_row(forecast, *shown, style="bold" if value == found else None)
        yield table
