"""Shared parts of all figures: colors (suitable for color-blind readers), grids of frames, and writing files."""

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
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.text import Text
from numpy.typing import NDArray

from crevnet.machine.files import replace_file, shown

Frames = NDArray[np.float32]
"""(T, C, H, W) in [0, 1]."""

VALUE_COLORS, ERROR_COLORS = "magma", "RdBu_r"
"""Color maps of non-negative values and of signed values."""
MODEL = "#D55E00"
OTHERS = ("#000000", "#0072B2", "#009E73", "#CC79A7", "#56B4E9")
"""Colors of lines (Okabe and Ito 2008): the trained model's, and those of the forecasts it is compared with."""


def frame_grid(rows: int, columns: int, height: int, width: int) -> tuple[Figure, NDArray[np.object_]]:
    """A figure with axes (rows, columns) for frames of height x width, with space for titles and color bars."""
    size = 2.6
    figure, axes = plt.subplots(
        rows, columns, figsize=(size * columns * width / height + 1.6, size * rows + 0.6), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    engine = figure.get_layout_engine()
    assert isinstance(engine, ConstrainedLayoutEngine)
    engine.set(w_pad=0.1)  # otherwise row labels touch the edge
    return figure, axes


def draw_frame(axis: Axes, image: NDArray[np.floating], lowest: float, highest: float, title: str) -> AxesImage:
    """Draw an image (H, W), in the color map of errors if `lowest` is negative, else in that of values."""
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_title(title, fontsize=9)
    return axis.imshow(image, vmin=lowest, vmax=highest, cmap=ERROR_COLORS if lowest < 0 else VALUE_COLORS)


def brightest(image: NDArray[np.floating], least: float = 1 / 255) -> float:
    """The upper end of the color scale: the 99.9 % quantile of the values, at least `least`."""
    return max(float(np.quantile(image, 0.999)), least)


def run_name(run: Path) -> str:
    """A short name of a run's folder for titles: the last three parts of its path."""
    return "/".join(run.parts[-3:])


def save(figure: Figure, path: Path) -> None:
    for text in figure.findobj(Text):  # names of folders may contain any bytes
        text.set_text(shown(text.get_text()))
    replace_file(path, partial(figure.savefig, dpi=150, format="png"))
    plt.close(figure)
