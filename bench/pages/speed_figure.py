"""The figure of bench/speed.py."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kit.time_row import Figures, Row
from pages.style import INK, SMALL, STYLES, TITLE, finish

NAMES = {
    "every 1": "every block",
    "every sqrt(L)": "every √L blocks",
    "min, guard off": "guard off",
    "max": 'budget "max"',
}
"""Settings, if they distinguish bars of a method."""
BACKWARD = 0.45
"""Opacity of the backward pass."""
TEXT: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": SMALL, "color": INK}


def draw(rows: Sequence[Row]) -> Figure:
    """A panel for each network, a bar for each method: forward and backward pass end to end, with the quartiles of their sum."""
    panels = [[*group] for _, group in groupby(rows, lambda row: row.network)]
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure((4.8 * columns, 3.2 * lines), layout="constrained")
    axes = [*figure.subplots(lines, columns, squeeze=False).flat]
    for axis, panel in zip(axes, panels, strict=False):
        draw_panel(axis, panel)
    for axis in axes[len(panels) :]:
        axis.remove()
    figure.supxlabel(
        "time of a training step, standard autograd = 1; dark: forward pass, light: backward pass", fontsize=9.5
    )
    return figure


def draw_panel(axis: Axes, rows: Sequence[Row]) -> None:
    timed = [(row, figures) for row in rows if (figures := row.figures)]
    without = {row.note.split(":")[0]: [r.method for r in rows if r.note == row.note] for row in rows if row.note}
    names = [name_of(row) for row, _ in timed] + [", ".join(methods) for methods in without.values()]
    axis.set_yticks(range(len(names)), names, fontsize=SMALL)
    axis.set_ylim(len(names) - 0.4, -0.6)
    for y, (row, figures) in enumerate(timed):
        draw_bar(axis, y, STYLES[row.method].color, figures)
    for y, note in enumerate(without, len(timed)):
        axis.annotate(note, (0, y), (4, 0), **TEXT, style="italic")
    axis.axvline(1, color=INK, linewidth=0.8, linestyle=":")
    axis.set_xlim(0, 1.15 * max(max(f.quartiles[1], f.time_ratio) for _, f in timed))
    axis.set_title(rows[0].network, loc="left", fontsize=TITLE)
    axis.tick_params(axis="y", length=0)
    finish(axis, "x")
    axis.spines["left"].set_visible(False)


def draw_bar(axis: Axes, y: int, color: str, figures: Figures) -> None:
    axis.barh(y, figures.forward, height=0.66, color=color)
    axis.barh(y, figures.backward, left=figures.forward, height=0.66, color=color, alpha=BACKWARD, linewidth=0)
    axis.plot(figures.quartiles, (y, y), color=INK, linewidth=1)
    end = max(figures.quartiles[1], figures.forward + figures.backward)
    axis.annotate(f"{figures.time_ratio:.2f}", (end, y), (4, 0), **TEXT)


def name_of(row: Row) -> str:
    setting = NAMES.get(row.setting, "")
    return f"{STYLES[row.method].name}, {setting}" if setting else STYLES[row.method].name
