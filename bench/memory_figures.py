"""The figures of bench/memory.py: bars, or lines where rows vary in one thing."""

from __future__ import annotations

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from memory_row import AXES, GIB, Row, beyond_model, label, lines_over

LIMITS = (16, 32)

COLOURS = {
    "plain": "#222222",
    "checkpoint": "#c2571a",
    "reversible-autoencoder": "#8fb8de",
    "reversible": "#2a6fb8",
    "reversible-bfloat16": "#7a4fb5",
    "reversible-offloaded": "#c23b7a",
    "reversible-every-3": "#1f8a5b",
}

NAMES = {
    "steps": "time steps",
    "layers": "layers of the autoencoder",
    "batch": "sequences in the batch",
    "pixels": "pixels of a frame",
}


def draw(rows: list[Row]) -> Figure:
    """Lines over the first of steps, layers, batch and pixels in which rows vary; without one, a bar for each row."""
    rows = [row for row in rows if row.peak is not None]
    for axis in AXES:
        lines = [*lines_over(axis, rows)]
        if lines:
            return draw_lines(axis, lines)
    return draw_bars(rows)


def draw_bars(rows: list[Row]) -> Figure:
    """The peak of each row, on a log axis, models apart, with the limits of devices."""
    figure, axes = plt.subplots(figsize=(8, 1.3 + 0.21 * len(rows)), layout="constrained")
    places, place = [], 0.0
    for before, row in zip([rows[0], *rows], rows, strict=False):
        place += 1 + 0.5 * ((before.model, before.preset) != (row.model, row.preset))
        places.append(place)
    sizes = [row.peak / GIB for row in rows]
    axes.barh(places, sizes, color=[COLOURS[row.schedule] for row in rows], height=0.8)
    for place, size in zip(places, sizes, strict=True):
        axes.annotate(f"{size:,.1f}", (size, place), (3, 0), textcoords="offset points", fontsize=7.5, va="center")
    axes.set_yticks(places, [label(row) for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_ylim(places[-1] + 0.8, places[0] - 0.8)
    axes.set_xscale("log")
    axes.set_xlim(min(sizes) / 1.6, max(sizes) * 1.8)
    for limit in LIMITS:
        axes.axvline(limit, color="#b00020", linewidth=1, linestyle=(0, (4, 2)), zorder=0)
        axes.annotate(
            f"{limit} GiB", (limit, 1), (2, 3), xycoords=("data", "axes fraction"), textcoords="offset points",
            fontsize=8, color="#b00020", ha="center",
        )  # fmt: skip
    first = rows[0]
    size = f"{first.steps} time steps of {first.height} x {first.width}, batch {first.batch}, {first.how}"
    axes.set_xlabel(f"peak memory of a training step, GiB: {size}")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    finish(axes, "x")
    return figure


def draw_lines(axis: str, lines: list[list[Row]]) -> Figure:
    """What a training step takes beyond parameters, gradients and Adam's state, along the axis; a panel for each preset."""
    panels: dict[tuple[str, str], list[list[Row]]] = {}
    for line in lines:
        panels.setdefault((line[0].model, line[0].preset), []).append(line)
    width = 4.4 * len(panels) + 0.6
    figure, axes = plt.subplots(1, len(panels), figsize=(width, 3.8), squeeze=False, layout="constrained")
    for panel, (name, its) in zip(axes[0], panels.items(), strict=True):
        for line in its:
            first = line[0]
            text = first.schedule if first.preset else f"patch {first.patch}, {first.schedule}"
            style = "-" if first.patch == 1 else "--" if first.patch == 2 else ":"
            places, sizes = [getattr(row, axis) for row in line], [beyond_model(row) / GIB for row in line]
            panel.plot(places, sizes, style, color=COLOURS[first.schedule], marker="o", markersize=4, label=text)
        panel.set_title(" ".join(filter(None, name)), fontsize=11)
        panel.set_xlabel(NAMES[axis])
        panel.set_xlim(left=0)
        panel.set_ylim(bottom=0)
        finish(panel, "both")
        panel.legend(fontsize=8, frameon=False)
    axes[0, 0].set_ylabel("memory beyond parameters,\ngradients and Adam, GiB")
    return figure


def finish(axes: Axes, grid: str) -> None:
    axes.grid(color="#e4e4e4", linewidth=0.6, axis=grid)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
