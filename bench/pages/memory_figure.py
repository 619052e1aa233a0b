"""The figures of bench/memory.py: bars, or lines if rows vary in one setting."""

from __future__ import annotations

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from kit.memory_row import AXES, GIB, Row, beyond_model, lines_over
from kit.schedules import PATCHED
from pages.style import INK, SMALL, STYLES, TITLE, finish

LIMITS = (16, 32)
LIMIT_COLOR = "#b00020"
ENDS = 36, 18
"""Ends of the bars' axes, in GiB. Longer bars are cut there, and have their sizes: they would squeeze the others."""

MODEL_NAMES = {
    "crevnet": "CrevNet",
    "convlstm": "ConvLSTM",
    "predrnn": "PredRNN",
    "predrnnpp": "PredRNN++",
    "vpn": "VPN",
    "prednet": "PredNet",
    "unet": "U-Net",
}

AXIS_NAMES = {
    "steps": "time steps",
    "layers": "layers of the autoencoder",
    "batch": "sequences in the batch",
    "pixels": "pixels per frame",
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
    """The peak of each row, and the growth per additional sequence, with the limits of devices."""
    places = places_of(rows)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, 1.6 + 0.17 * places[-1]), sharey=True, width_ratios=(2, 1), layout="constrained"
    )
    colors = [STYLES[row.schedule].color for row in rows]
    bars(left, places, [row.measured_peak / GIB for row in rows], colors, ENDS[0])
    left.set_xlabel(
        f"peak of a training step with a batch of {rows[0].batch}, GiB;\n"
        "left of the white mark: parameters, gradients, Adam"
    )
    for place, row in zip(places, rows, strict=True):
        model = (row.measured_peak - beyond_model(row)) / GIB
        left.plot([model, model], [place - 0.42, place + 0.42], color="white", linewidth=1.5)
    draw_limits(left)
    growth = [row.one_more / GIB for row in rows if row.one_more is not None]
    if len(growth) < len(rows):
        right.set_visible(False)
    else:
        bars(right, places, growth, colors, ENDS[1])
        right.set_xlabel("growth per additional\nsequence, GiB")
        right.tick_params(axis="y", length=0)
    settings = {
        name_of(row): [p for p, r in zip(places, rows, strict=True) if name_of(r) == name_of(row)] for row in rows
    }
    left.set_yticks([sum(its) / len(its) for its in settings.values()], [*settings], fontsize=SMALL)
    left.set_ylim(places[-1] + 0.8, places[0] - 0.8)
    explain_colors(figure, {row.schedule for row in rows})
    return figure


def places_of(rows: list[Row]) -> list[float]:
    """Heights of the bars, with gaps between models."""
    places, place, before = [], 0.0, rows[0]
    for row in rows:
        place += 1.0 if name_of(row) == name_of(before) else 1.5
        places.append(place)
        before = row
    return places


def draw_limits(axes: Axes) -> None:
    for limit in LIMITS:
        if limit < axes.get_xlim()[1]:
            axes.axvline(limit, color=LIMIT_COLOR, linewidth=1, linestyle=(0, (4, 2)), zorder=0)
            axes.annotate(
                f"{limit} GiB", (limit, 1), (0, 3), xycoords=("data", "axes fraction"), textcoords="offset points",
                fontsize=SMALL, color=LIMIT_COLOR, ha="center",
            )  # fmt: skip


def explain_colors(figure: Figure, schedules: set[str]) -> None:
    patches = [Patch(color=s.color, label=s.name) for name, s in STYLES.items() if name in schedules]
    figure.legend(handles=patches, loc="outside upper center", ncols=len(patches), frameon=False, fontsize=SMALL)


def name_of(row: Row) -> str:
    setting = row.preset or ("" if row.model not in PATCHED else f"patch {row.patch}")
    return f"{MODEL_NAMES[row.model]} {setting}".strip()


def bars(axes: Axes, places: list[float], sizes: list[float], colors: list[str], longest: float) -> None:
    """Bars on a linear axis. One that is longer than the axis has a gap in front of its end, and its size behind."""
    end = min(1.15 * max(sizes), longest)
    axes.barh(places, [min(size, end) for size in sizes], color=colors, height=0.84)
    axes.set_xlim(0, end)
    for place, size in zip(places, sizes, strict=True):
        text = f"{size:,.2f}" if size < 10 else f"{size:,.1f}" if size < 100 else f"{size:,.0f}"
        is_cut = size > end
        if is_cut:
            gap = [0.955 * end, 0.965 * end], [place + 0.42, place - 0.42]
            axes.plot(*gap, color="white", linewidth=3, solid_capstyle="butt")
        at = axes.annotate(
            text, (min(size, end), place), (3, 0), textcoords="offset points", fontsize=7.5, va="center",
            annotation_clip=False, weight="bold" if is_cut else "normal", color=INK,
        )  # fmt: skip
        at.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})  # above the limits' lines
    finish(axes, "x")


def draw_lines(axis: str, lines: list[list[Row]]) -> Figure:
    """Memory of a training step beyond parameters, gradients and Adam's state, along the axis; a panel for each preset."""
    panels: dict[str, list[list[Row]]] = {}
    for line in lines:
        panels.setdefault(f"{MODEL_NAMES[line[0].model]} {line[0].preset}".strip(), []).append(line)
    width = 5.4 * len(panels) + 0.6
    figure, axes = plt.subplots(1, len(panels), figsize=(width, 3.8), squeeze=False, layout="constrained")
    for panel, (name, its) in zip(axes[0], panels.items(), strict=True):
        for line in its:
            first = line[0]
            style = "-" if first.patch == 1 else "--" if first.patch == 2 else ":"
            places, sizes = [getattr(row, axis) for row in line], [beyond_model(row) / GIB for row in line]
            panel.plot(places, sizes, style, color=STYLES[first.schedule].color, marker="o", markersize=4)
        panel.set_title(name, loc="left", fontsize=TITLE)
        panel.set_xlabel(AXIS_NAMES[axis])
        panel.set_xlim(left=0)
        panel.set_ylim(bottom=0)
        finish(panel, "both")
        label_ends(panel, axis, its)
    axes[0, 0].set_ylabel("memory beyond parameters,\ngradients and Adam, GiB")
    return figure


def label_ends(panel: Axes, axis: str, lines: list[list[Row]]) -> None:
    """Name each line at its last point, with the size there. Labels keep a distance from each other."""
    lowest, distance = 0.0, panel.get_ylim()[1] / 17
    for row in sorted((line[-1] for line in lines), key=beyond_model):
        style, size = STYLES[row.schedule], beyond_model(row) / GIB
        name = style.name if row.preset else f"patch {row.patch}, {style.name}"
        lowest = max(size, lowest + distance)
        panel.annotate(
            f"{name} {size:.2f}", (1.02, lowest), xycoords=("axes fraction", "data"), fontsize=SMALL, va="center",
            color=style.color, annotation_clip=False,
        )  # fmt: skip
