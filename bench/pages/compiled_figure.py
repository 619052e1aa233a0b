"""The figure of bench/compiled.py."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kit.compiled_row import Row
from pages.style import INK, SMALL, STYLES, TITLE, finish

EAGER = 0.45
"""Opacity of eager steps."""


def draw(rows: Sequence[Row]) -> Figure:
    """A panel for each network, a bar for each method, with the quartiles of its time."""
    panels = [[*group] for _, group in groupby(rows, lambda row: row.network)]
    figure = Figure((2.2 + 3.0 * len(panels), 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)
    for axis, panel in zip(axes.flat, panels, strict=True):
        draw_panel(axis, panel)
    figure.supxlabel(
        "time of a training step, eager standard autograd = 1, and streams saved for the backward pass; pale: eager",
        fontsize=9.5,
    )
    return figure


def draw_panel(axis: Axes, rows: Sequence[Row]) -> None:
    names = [f"{STYLES[row.method].name}, {row.setting or 'eager'}" for row in rows]
    axis.set_yticks(range(len(names)), names, fontsize=SMALL)
    axis.set_ylim(len(names) - 0.4, -0.6)
    for y, row in enumerate(rows):
        axis.barh(y, row.time_ratio, height=0.66, color=STYLES[row.method].color, alpha=1 if row.setting else EAGER)
        axis.plot(row.quartiles, (y, y), color=INK, linewidth=1)
        text = f"{row.time_ratio:.2f}, {row.saved_streams:.1f} streams"
        place = max(row.time_ratio, row.quartiles[1]), y
        axis.annotate(text, place, (4, 0), textcoords="offset points", va="center", fontsize=SMALL, color=INK)
    axis.axvline(1, color=INK, linewidth=0.8, linestyle=":")
    axis.set_xlim(0, 1.6 * max(row.time_ratio for row in rows))
    axis.set_title(rows[0].network, loc="left", fontsize=TITLE)
    axis.tick_params(axis="y", length=0)
    finish(axis, "x")
    axis.spines["left"].set_visible(False)
