"""What all figures share: colours, grids of frames, and how they are written. The colours are told apart by the colour-blind."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.text import Text
from numpy.typing import NDArray

from crevnet.machine.files import replace_file, shown

Frames = NDArray[np.float32]
"""(T, C, H, W) in [0, 1]."""

VALUES, ERRORS = "magma", "RdBu_r"
"""Colour maps: of values from 0 on, and of what has a sign."""
MODEL = "#D55E00"
OTHERS = ("#000000", "#0072B2", "#009E73", "#CC79A7", "#56B4E9")
"""Colours of lines (Okabe and Ito 2008): the trained model's, and those of what stands beside it."""


def frame_grid(rows: int, columns: int, height: int, width: int) -> tuple[Figure, NDArray[np.object_]]:
    """A figure of axes (rows, columns) for frames of height x width, with room for titles and colour bars."""
    size = 2.6
    figure, axes = plt.subplots(
        rows, columns, figsize=(size * columns * width / height + 1.6, size * rows + 0.6), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    figure.get_layout_engine().set(w_pad=0.1)  # else names of rows touch the edge
    return figure, axes


def draw_frame(axis: Axes, image: NDArray[np.floating], lowest: float, highest: float, title: str) -> AxesImage:
    """An image (H, W): of errors where `lowest` is negative, else of values."""
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_title(title, fontsize=9)
    return axis.imshow(image, vmin=lowest, vmax=highest, cmap=ERRORS if lowest < 0 else VALUES)


def brightest(image: NDArray[np.floating], least: float = 1 / 255) -> float:
    """Where the scale of colours ends: above all but the thousandth part of the values."""
    return max(float(np.quantile(image, 0.999)), least)


def run_name(run: Path) -> str:
    """A run's folder in a title, where there is no room for a long path."""
    return "/".join(run.parts[-3:])


def save(figure: Figure, path: Path) -> None:
    for text in figure.findobj(Text):  # of names of folders, which may be any bytes
        text.set_text(shown(text.get_text()))
    replace_file(path, partial(figure.savefig, dpi=150, format="png"))
    plt.close(figure)
