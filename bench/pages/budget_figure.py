"""The figure of bench/budget.py."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby, pairwise
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kit.time_row import Figures, Row
from pages.labels import Label, place
from pages.style import SMALL, STYLES, TITLE, finish

LONGEST = 2.0
"""The end of the time axis. Slower points are drawn there, with their times: they would squeeze the others."""
NOTE = """\
Down and to the left is better.

Bars show quartiles.

The numbers next to squares are
blocks per checkpoint.

The line of revflow goes from the budget
"min" to "max". Circles are revflow with
the memory of another method."""


class Point(NamedTuple):
    """A row in the panel."""

    row: Row
    figures: Figures

    @property
    def place(self) -> tuple[float, float]:
        return self.figures.peak / 2**20, min(self.figures.time_ratio, LONGEST)

    @property
    def key(self) -> str:
        return self.row.method

    @property
    def is_on_line(self) -> bool:
        """Whether it is one of revflow's own budgets, and not one with another method's memory."""
        return self.key == "revflow" and not self.row.setting.startswith("as ")


def draw(rows: list[Row]) -> Figure:
    """A panel for each network: peak memory to the right, time upwards with its quartiles."""
    panels = [[*group] for _, group in groupby(rows, lambda row: row.network)]
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure((4.6 * columns, 3.7 * lines), layout="constrained")
    axes = [*figure.subplots(lines, columns, squeeze=False).flat]
    drawn = [draw_panel(axis, panel) for axis, panel in zip(axes, panels, strict=False)]
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
        axis.text(0.08, 0.9, NOTE, va="top", fontsize=SMALL, transform=axis.transAxes)
    for axis, points in zip(axes, drawn, strict=False):
        label_points(axis, points)
    return figure


def draw_panel(axis: Axes, rows: Iterable[Row]) -> list[Point]:
    shown = [row for row in rows if "chunks" not in row.setting]  # their times would squeeze the others
    points = [Point(row, figures) for row in shown if (figures := row.figures)]
    for key, style in STYLES.items():
        its = sorted((p for p in points if p.key == key), key=lambda p: p.figures.peak)
        if not its:
            continue
        sizes, times = zip(*(p.place for p in its), strict=True)
        lows, highs = zip(*([min(q, LONGEST) for q in p.figures.quartiles] for p in its), strict=True)
        axis.vlines(sizes, lows, highs, color=style.color, alpha=0.3)
        axis.plot(
            sizes, times, color=style.color, marker=style.marker, markersize=12 if key == "plain" else 6, linestyle="none",
            markeredgewidth=0.6, markeredgecolor="white", clip_on=False, zorder=3 if key == "revflow" else 4,
        )  # fmt: skip
        line = [p.place for p in its if p.is_on_line]
        if line:
            axis.plot(*zip(*line, strict=True), color=style.color, clip_on=False, zorder=2)
    axis.set_title(points[0].row.network, loc="left", fontsize=TITLE)
    axis.set_xlabel("peak memory, MiB")
    axis.set_ylabel("time, standard autograd = 1")
    axis.set_xlim(0, 1.04 * max(p.place[0] for p in points))
    axis.set_ylim(0.95, LONGEST)
    finish(axis, "both")
    return points


def label_points(axis: Axes, points: list[Point]) -> None:
    """A label for each method, and a number for each setting of checkpointing."""
    named: dict[str, Point] = {}
    for point in sorted(points, key=lambda p: -p.figures.peak):
        named[point.key] = point
    revflow = sorted((p for p in points if p.is_on_line), key=lambda p: p.figures.peak)
    if revflow:
        named["revflow"] = revflow[len(revflow) * 2 // 3]
    on_line = [
        (a.place[0] + (b.place[0] - a.place[0]) * k / 8, a.place[1] + (b.place[1] - a.place[1]) * k / 8)
        for a, b in pairwise(revflow)
        for k in range(8)
    ]
    labels = []
    for key, point in named.items():
        ratio = point.figures.time_ratio
        late = f": {ratio:.2f} ↑" if ratio > LONGEST else ""
        labels.append(Label(STYLES[key].name + late, point.place, STYLES[key].color))
    of_checkpoints = [p for p in points if p.row.setting.removeprefix("every ").isdecimal() and p.key == "checkpoint"]
    numbers = [Label(p.row.setting.removeprefix("every "), p.place, STYLES[p.key].color) for p in of_checkpoints]
    place(axis, [*numbers, *labels], [*(p.place for p in points), *on_line])
