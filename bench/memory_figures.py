"""The figures of bench/memory.py: bars, or lines where rows vary in one thing."""

from __future__ import annotations

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from memory_row import AXES, GIB, Row, beyond_model, lines_over
from schedules import PATCHED

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

# As the README and docs/ call them.
SCHEDULE_NAMES = {
    "plain": "standard autograd",
    "checkpoint": "checkpointing",
    "reversible-autoencoder": "revflow, autoencoder only",
    "reversible": "revflow",
    "reversible-bfloat16": "revflow, states in bfloat16",
    "reversible-offloaded": "revflow, states offloaded",
    "reversible-every-3": "revflow, every third state",
}

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
    """The peak of each row, and what another sequence adds, on log axes, with the limits of devices."""
    settings = {name_of(row): 0.0 for row in rows}
    places, place, before = [], 0.0, rows[0]
    for row in rows:
        place += 1.0 if name_of(row) == name_of(before) else 1.5
        places.append(place)
        before = row
    for name in settings:
        its = [place for place, row in zip(places, rows, strict=True) if name_of(row) == name]
        settings[name] = sum(its) / len(its)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, 1.5 + 0.17 * places[-1]), sharey=True, width_ratios=(2, 1), layout="constrained"
    )
    colours = [COLOURS[row.schedule] for row in rows]
    bars(left, places, [row.peak / GIB for row in rows], colours)
    first = rows[0]
    left.set_xlabel(
        f"peak of a training step with a batch of {first.batch}, GiB;\nleft of the white mark: parameters, gradients, Adam"
    )
    for place, row in zip(places, rows, strict=True):
        model = (row.peak - beyond_model(row)) / GIB
        left.plot([model, model], [place - 0.42, place + 0.42], color="white", linewidth=1.5)
    for limit in LIMITS:
        left.axvline(limit, color="#b00020", linewidth=1, linestyle=(0, (4, 2)), zorder=0)
        left.annotate(
            f"{limit} GiB", (limit, 1), (0, 3), xycoords=("data", "axes fraction"), textcoords="offset points",
            fontsize=8, color="#b00020", ha="center",
        )  # fmt: skip
    if first.one_more is None:
        right.set_visible(False)
    else:
        bars(right, places, [row.one_more / GIB for row in rows], colours)
        right.set_xlabel("by what it grows with\nanother sequence, GiB")
        right.tick_params(axis="y", length=0)
    left.set_yticks([*settings.values()], [*settings], fontsize=8.5)
    left.set_ylim(places[-1] + 0.8, places[0] - 0.8)
    explain_colours(figure, {row.schedule for row in rows})
    return figure


def explain_colours(figure: Figure, schedules: set[str]) -> None:
    patches = [Patch(color=colour, label=SCHEDULE_NAMES[name]) for name, colour in COLOURS.items() if name in schedules]
    figure.legend(handles=patches, loc="outside upper center", ncols=len(patches), frameon=False, fontsize=8.5)


def name_of(row: Row) -> str:
    setting = row.preset or ("" if row.model not in PATCHED else f"patch {row.patch}")
    return f"{MODEL_NAMES[row.model]} {setting}".strip()


def bars(axes: Axes, places: list[float], sizes: list[float], colours: list[str]) -> None:
    axes.barh(places, sizes, color=colours, height=0.84)
    for place, size in zip(places, sizes, strict=True):
        text = f"{size:,.2f}" if size < 10 else f"{size:,.1f}" if size < 100 else f"{size:,.0f}"
        at = axes.annotate(text, (size, place), (3, 0), textcoords="offset points", fontsize=7, va="center")
        at.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})  # above the limits' lines
    axes.set_xscale("log")
    axes.set_xlim(min(sizes) / 1.6, max(*sizes, max(LIMITS)) * 2.2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    finish(axes, "x")


def draw_lines(axis: str, lines: list[list[Row]]) -> Figure:
    """Memory of a training step beyond parameters, gradients and Adam's state, along the axis; one panel per preset."""
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
            panel.plot(places, sizes, style, color=COLOURS[first.schedule], marker="o", markersize=4)
        panel.set_title(name, fontsize=11)
        panel.set_xlabel(AXIS_NAMES[axis])
        panel.set_xlim(left=0)
        panel.set_ylim(bottom=0)
        finish(panel, "both")
        label_ends(panel, axis, its)
    axes[0, 0].set_ylabel("memory beyond parameters,\ngradients and Adam, GiB")
    return figure


def label_ends(panel: Axes, axis: str, lines: list[list[Row]]) -> None:
    """Name each line at its last point, with the size there; labels keep a distance from each other."""
    lowest, distance = 0.0, panel.get_ylim()[1] / 17
    for row in sorted((line[-1] for line in lines), key=beyond_model):
        name = SCHEDULE_NAMES[row.schedule] if row.preset else f"patch {row.patch}, {SCHEDULE_NAMES[row.schedule]}"
        size = beyond_model(row) / GIB
        lowest = max(size, lowest + distance)
        panel.annotate(
            f"{name} {size:.2f}", (1.02, lowest), xycoords=("axes fraction", "data"), fontsize=8.5, va="center",
            color=COLOURS[row.schedule], annotation_clip=False,
        )  # fmt: skip


def finish(axes: Axes, grid: str) -> None:
    axes.grid(color="#e4e4e4", linewidth=0.6, axis=grid)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
