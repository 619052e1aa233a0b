"""The figure of bench/speed.py."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trials import Row

FORWARD, BACKWARD, INK, PALE = "#2a6fb8", "#a9cbee", "#1c1c1c", "#e4e4e4"


def draw(rows: Sequence[Row]) -> Figure:
    """A panel a network, a bar a method: forward and backward pass end to end, with the quartiles of their sum."""
    panels = [[*group] for _, group in groupby(rows, lambda row: row.network)]
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure((5.4 * columns, 3.3 * lines + 0.3), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for axis, panel in zip(axes, panels, strict=False):
        draw_panel(axis, panel)
    for axis in [*axes][len(panels) :]:
        axis.remove()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def draw_panel(axis: Axes, rows: Sequence[Row]) -> None:
    axis.set_yticks(range(len(rows)), [row.label.replace("sqrt(L)", "√L") for row in rows], color=INK)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    timed = {y: row for y, row in enumerate(rows) if row.time_ratio is not None}
    forward, backward = ([getattr(row, part) for row in timed.values()] for part in ("forward", "backward"))
    axis.barh([*timed], forward, height=0.66, color=FORWARD, label="forward pass")
    axis.barh([*timed], backward, left=forward, height=0.66, color=BACKWARD, label="backward pass")
    for y, row in enumerate(rows):
        if y in timed:
            axis.plot(row.quartiles, (y, y), color=INK, linewidth=1)
            axis.annotate(
                f"{row.time_ratio:.2f}", (max(row.quartiles[1], row.forward + row.backward), y), (4, 0), **TEXT
            )
        else:
            axis.annotate(row.note.split(":")[0], (0, y), (4, 0), **TEXT, style="italic")
    axis.axvline(1, color=INK, linewidth=0.8, linestyle=":")
    axis.set_xlim(0, 1.15 * max(max(row.quartiles[1], row.time_ratio) for row in timed.values()))
    axis.set_title(rows[0].network, loc="left", fontsize=11, color=INK)
    axis.set_xlabel("time of a step, standard autograd = 1", color=INK)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color=PALE, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)


TEXT: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 8, "color": INK}
