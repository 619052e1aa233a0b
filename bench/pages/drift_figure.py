"""The figure of bench/drift.py."""

from __future__ import annotations

from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kit.arithmetics import Row
from pages.style import INK, PALE, TITLE


class Style(NamedTuple):
    """How an arithmetic is drawn: blue, as all of revflow's."""

    color: str
    marker: str
    line: str


STYLES = {
    "float32": Style("#2a6fb8", "o", "-"),
    "float32 streams, bf16 autocast": Style("#3fb0c6", "s", "--"),
    "exact": Style("#12355b", "D", "-"),
    "exact, bf16 autocast": Style("#5b5fc7", "x", "--"),
}
SIGNS = {"D": "◇", "x": "×"}
"""Markers in a line of text."""
TITLES = {"rebuilt": "Input recomputed by the backward pass", "gradients": "Gradients of the parameters"}
SMALLEST = 1e-8
"""Below this the axis is linear, and ends at 0."""


def draw(rows: list[Row]) -> Figure:
    figure = Figure((9.2, 4.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, (name, title) in zip(panels, TITLES.items(), strict=True):
        draw_panel(panel, rows, name)
        panel.set_title(title, loc="left", fontsize=TITLE, color=INK)
    panels[0].set_ylabel("relative error", color=INK)
    return figure


def draw_panel(panel: Axes, rows: list[Row], name: str) -> None:
    depths = sorted({row.blocks for row in rows})
    panel.set_xscale("log")
    panel.set_yscale("symlog", linthresh=SMALLEST, linscale=1.3)
    panel.set_ylim(-0.25 * SMALLEST, 4)
    panel.set_yticks([0, *(10.0**e for e in range(-8, 1, 2))], ["0", *(f"$10^{{{e}}}$" for e in range(-8, 0, 2)), "1"])
    panel.set_yticks([], minor=True)
    panel.set_xticks(depths, [str(depth) for depth in depths])
    panel.set_xticks([], minor=True)
    panel.set_xlabel("blocks", color=INK)
    panel.tick_params(colors=INK, length=0)
    panel.grid(color=PALE, linewidth=0.6)
    panel.spines[:].set_visible(False)
    for height, (arithmetic, style) in enumerate(STYLES.items()):
        errors = {row.blocks: getattr(row, name) for row in rows if row.arithmetic == arithmetic}
        draw_line(panel, errors, arithmetic, style, 13 * (len(STYLES) - 1 - height))


def draw_line(panel: Axes, errors: dict[int, float], label: str, style: Style, height: float) -> None:
    """A line with its label at the end. Lines of exact arithmetic coincide, so their labels are at different heights."""
    exact = style.marker in SIGNS
    if exact and not any(errors.values()):
        label = f"{SIGNS[style.marker]} {label}: 0, equal to the last bit"
    panel.plot(
        [*errors], [*errors.values()], style.line, color=style.color, marker=style.marker, linewidth=1 if exact else 1.8,
        markersize=8 if exact else 5, markerfacecolor="none" if exact else style.color, clip_on=False, zorder=3,
    )  # fmt: skip
    end = max(errors)
    panel.annotate(
        label, (end, errors[end]), (0, 9 + height * exact), textcoords="offset points", ha="right", color=style.color,
        fontsize=9.5,
    )  # fmt: skip
