"""The common style of the figures: one name, color and marker per method, and axes without frames."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, PALE = "#222222", "#e4e4e4"
SMALL, TITLE = 8.5, 11
"""Sizes of text in points. Pages show a figure at half its pixels or more."""


class Style(NamedTuple):
    """The name, color and marker of a method."""

    name: str
    color: str
    marker: str = "o"


# Methods of bench/kit/methods.py, libraries of bench/kit/libraries.py and schedules of bench/kit/schedules.py. All need a style.
# revflow's variants are blue.
STYLES = {
    "plain": Style("standard autograd", INK, "*"),
    "checkpoint": Style("checkpointing", "#c2571a", "s"),
    "selective": Style("selective checkpointing", "#a67c00", "P"),
    "memcnn": Style("memcnn", "#7a4fb5", "v"),
    "revtorch": Style("revtorch", "#1f8a5b", "^"),
    "revlib": Style("revlib", "#c23b7a", "D"),
    "revflow": Style("revflow", "#2a6fb8"),
    "reversible": Style("revflow", "#2a6fb8"),
    "reversible-autoencoder": Style("revflow, autoencoder only", "#5c9bd6"),
    "reversible-bfloat16": Style("revflow, states in bfloat16", "#3fb0c6"),
    "reversible-offloaded": Style("revflow, states offloaded", "#5b5fc7"),
    "reversible-every-3": Style("revflow, every third state", "#12355b"),
}


def finish(axes: Axes, grid: Literal["both", "x", "y"]) -> None:
    """Draw the grid below the data, and leave out the frame's upper and right side."""
    axes.grid(color=PALE, linewidth=0.6, axis=grid)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: Path) -> None:
    with plt.rc_context({"pdf.fonttype": 42, "svg.fonttype": "none"}):  # text stays text
        figure.savefig(path, dpi=160)
    plt.close(figure)
