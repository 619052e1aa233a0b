"""Tables of scores that fit the terminal: one of all measures, and for each measure its values by channel and horizon."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from crevnet.data.files.layouts import Layout
from crevnet.evaluation.metrics import SSIM_SIDE
from crevnet.evaluation.scores import Scores
from crevnet.machine.wording import listed

Columns = Mapping[str, Sequence[str]]
"""Cells by their column's title, one per row."""


class Measure(NamedTuple):
    """How a measure is printed."""

    title: str
    format: str
    best: Callable[[Iterable[float]], float]


PRINTED = {
    "mse": Measure("MSE", ".3e", min),
    "mae": Measure("MAE", ".3e", min),
    "psnr": Measure("PSNR, dB", ".2f", max),
    "ssim": Measure("SSIM", ".4f", max),
}
_GAP = 2
"""Spaces between columns."""
_LONGEST_NAME = 40
"""Longer names of forecasts are folded."""


def score_tables(
    scores: Mapping[str, Scores], channels: int, horizons: Sequence[int], layout: Layout, width: int
) -> Iterator[Table]:
    """The tables, with a row per forecast and no wider than `width`.

    Each measure's best value is bold. A measure without values has no table of its own.
    """
    bests = _bests(scores)
    yield from fitting_tables("", [*scores], {"": _overview(scores, layout)}, width, bests, _without(scores))
    names = [layout.channel_name(c) for c in range(channels)], [layout.lead(horizon) for horizon in horizons]
    for name, measure in PRINTED.items():
        if measure.title not in bests:
            continue
        kinds = zip(("channel", "horizon"), names, strict=True)
        groups = {kind: _parts(scores, f"{name}_by_{kind}", measure, titles) for kind, titles in kinds}
        yield from fitting_tables(measure.title, [*scores], groups, width)


def fitting_tables(
    title: str,
    rows: Sequence[str],
    groups: Mapping[str, Columns],
    width: int,
    bold: Mapping[str, int] | None = None,
    caption: str | None = None,
) -> Iterator[Table]:
    """Tables of these rows. Groups of columns share a table if they fit; a group that is too wide is split evenly.

    groups: columns by what they distinguish, such as channels, which the title names after "by".
    bold: for a column's title, the row whose cell is bold.
    """
    room = width - min(_LONGEST_NAME, max(map(len, ("forecast", *rows))))
    together: dict[str, Columns] = {}
    for name, columns in groups.items():
        for part in _split(columns, room):
            if together and (name in together or _width(part) + sum(map(_width, together.values())) > room):
                yield _table(title, rows, together, bold or {}, caption)
                together = {}
            together[name] = part
    yield _table(title, rows, together, bold or {}, caption)


def _overview(scores: Mapping[str, Scores], layout: Layout) -> Columns:
    columns = {m.title: [format(getattr(s, name), m.format) for s in scores.values()] for name, m in PRINTED.items()}
    columns["summed"] = [format(s.mse_summed, ".2f") for s in scores.values()]
    if layout.has_roads:
        columns["on roads"] = [format(s.mse_on_roads, PRINTED["mse"].format) for s in scores.values()]
    return columns


def _bests(scores: Mapping[str, Scores]) -> dict[str, int]:
    """The row of the best value of each measure, if there is one."""
    bests = {}
    for name, measure in PRINTED.items():
        values = [getattr(s, name) for s in scores.values()]
        known = [value for value in values if not math.isnan(value)]
        if known:
            bests[measure.title] = values.index(measure.best(known))
    return bests


def _without(scores: Mapping[str, Scores]) -> str | None:
    """Why there is no SSIM, if there is none."""
    missing = any(math.isnan(s.ssim) for s in scores.values())
    return f"nan: SSIM requires frames of at least {SSIM_SIDE} x {SSIM_SIDE} pixels" if missing else None


def _parts(scores: Mapping[str, Scores], field: str, measure: Measure, titles: Sequence[str]) -> Columns:
    by_part = zip(*(getattr(s, field) for s in scores.values()), strict=True)
    return {
        title: [format(value, measure.format) for value in values]
        for title, values in zip(titles, by_part, strict=True)
    }


def _split(columns: Columns, room: int) -> Iterator[Columns]:
    """The columns in as few equal parts as fit."""
    titles = [*columns]
    for parts in range(1, len(titles) + 1):
        size = math.ceil(len(titles) / parts)
        found = [{t: columns[t] for t in titles[start : start + size]} for start in range(0, len(titles), size)]
        if size == 1 or max(map(_width, found)) <= room:
            yield from found
            return


def _width(columns: Columns) -> int:
    return sum(max(map(len, (title, *cells))) + _GAP for title, cells in columns.items())


def _table(
    title: str, rows: Sequence[str], groups: Mapping[str, Columns], bold: Mapping[str, int], caption: str | None
) -> Table:
    by = [name for name in groups if name]
    table = Table(
        title=f"{title} by {listed(by, 'and')}" if by else title or None,
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, _GAP - 1, 0, 0),  # the box adds a space
    )
    table.add_column("forecast", overflow="fold")
    columns = {column: cells for group in groups.values() for column, cells in group.items()}
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for number, row in enumerate(rows):
        cells = (Text(c[number], "bold" if bold.get(name) == number else "") for name, c in columns.items())
        table.add_row(Text(row), *cells)
    return table
