"""Error maps: of a forecast over a city, and of an input frame that is reconstructed from the prediction."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from crevnet.data.files.layouts import Layout
from crevnet.figures.canvas import Frames, brightest, draw_frame, frame_grid

_LEAST = 1e-12
"""Smallest range of a color scale."""


def error_maps_figure(maps: Mapping[str, NDArray[np.float64]], title: str, layout: Layout) -> Figure:
    """The mean squared error of each pixel for two forecasts, and their difference. One row per channel.

    `maps` maps a forecast's name to its errors (C, H, W); the trained model comes first. Both share a color scale.
    """
    (name, found), (other, beside) = maps.items()
    figure, axes = frame_grid(len(found), 3, *found.shape[1:])
    for c, row in enumerate(axes):
        difference = found[c] - beside[c]
        highest = brightest(np.stack((found[c], beside[c])), _LEAST)
        most = brightest(np.abs(difference), _LEAST)
        for axis, of, errors in zip(row[:2], (name, other), (found[c], beside[c]), strict=True):
            shown = draw_frame(axis, errors, 0, highest, f"{of}\nMSE {errors.mean():.2e}")
        figure.colorbar(shown, ax=row[1], fraction=0.05, extend="max")
        shown = draw_frame(
            row[2], difference, -most, most, f"difference {difference.mean():+.2e}\nblue: {name} is better"
        )
        figure.colorbar(shown, ax=row[2], fraction=0.05, extend="both")
        row[0].set_ylabel(layout.channel_name(c), fontsize=10)
    figure.suptitle(f"{title}\nmean squared error of each pixel (values in [0, 1])", fontsize=11)
    return figure


def rebuilt_figure(frame: Frames, rebuilt: Frames, title: str, layout: Layout) -> Figure:
    """An input frame (C, H, W), its reconstruction from the prediction by eq. 5, and the difference. One row per channel."""
    figure, axes = frame_grid(len(frame), 3, *frame.shape[1:])
    for c, row in enumerate(axes):
        difference = rebuilt[c] - frame[c]
        most = float(np.abs(difference).max())
        for axis, of, values in zip(row[:2], ("input", "reconstructed"), (frame[c], rebuilt[c]), strict=True):
            shown = draw_frame(axis, values, 0, brightest(frame[c]), of)
        figure.colorbar(shown, ax=row[1], fraction=0.05)
        scale = max(most, _LEAST)
        shown = draw_frame(row[2], difference, -scale, scale, f"difference, at most {most:.1e}")
        figure.colorbar(shown, ax=row[2], fraction=0.05)
        row[0].set_ylabel(layout.channel_name(c), fontsize=10)
    figure.suptitle(
        f"{title}\ninput reconstructed from the prediction by eq. 5 (values in [0, 1], {frame.dtype})", fontsize=11
    )
    return figure
