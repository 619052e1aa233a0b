"""Pictures of forecasts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.figure import Figure
from numpy.typing import NDArray

from crevnet.data import Layout

Frames = NDArray[np.float32]
"""(T, C, H, W) in [0, 1]."""


def forecast_figure(
    past: Frames, truth: Frames, forecast: Frames, title: str, layout: Layout, channel: int = 1
) -> Figure:
    """A column a predicted frame: the last input, the truth, the forecast and its error, for one channel."""
    horizon = len(truth)
    rows = [
        ("input", past[-horizon:, channel]),
        ("truth", truth[:, channel]),
        ("prediction", forecast[:, channel]),
        ("error", forecast[:, channel] - truth[:, channel]),
    ]
    brightest = max(float(np.quantile(truth[:, channel], 0.999)), 1 / 255)
    height, width = truth.shape[-2:]
    size = 2.6
    figure, axes = plt.subplots(
        len(rows), horizon, figsize=(size * horizon * width / height + 1.6, size * len(rows) + 0.6), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for row, (name, images) in enumerate(rows):
        limits = (-brightest, brightest) if name == "error" else (0, brightest)
        for column, image in enumerate(images):
            axis = axes[row, column]
            shown = axis.imshow(image, vmin=limits[0], vmax=limits[1], cmap="RdBu_r" if name == "error" else "magma")
            axis.set_xticks([])
            axis.set_yticks([])
            steps = column + 1 - (horizon if name == "input" else 0)
            axis.set_title(layout.lead(steps) if steps else "now", fontsize=9)
            if column == 0:
                axis.set_ylabel(name, fontsize=11)
        figure.colorbar(shown, ax=axes[row, :].tolist(), fraction=0.04)
    figure.suptitle(f"{title}: {layout.channel_name(channel)}", fontsize=11)
    return figure


def forecast_animation(
    past: Frames, truth: Frames, forecast: Frames, path: Path, layout: Layout, channel: int = 1
) -> None:
    """A GIF: the past, then truth and prediction side by side."""
    left, right = np.concatenate((past, truth))[:, channel], np.concatenate((past, forecast))[:, channel]
    brightest = max(float(np.quantile(left, 0.999)), 1 / 255)
    figure, axes = plt.subplots(1, 2, figsize=(7, 4), layout="constrained")
    images = [
        axis.imshow(frames[0], vmin=0, vmax=brightest, cmap="magma")
        for axis, frames in zip(axes, (left, right), strict=True)
    ]
    for axis, name in zip(axes, ("truth", "prediction"), strict=True):
        axis.set_axis_off()
        axis.set_title(name)

    def draw(t: int) -> Sequence[matplotlib.image.AxesImage]:
        for image, frames in zip(images, (left, right), strict=True):
            image.set_data(frames[t])
        lead, kind = layout.lead(t + 1 - len(past)), "seen" if t < len(past) else "predicted"
        figure.suptitle(f"{lead}, {kind}: {layout.channel_name(channel)}")
        return images

    FuncAnimation(figure, draw, frames=len(left)).save(path, PillowWriter(fps=3))
    plt.close(figure)


def day_figure(frame: Frames, road_map: Frames, title: str, layout: Layout) -> Figure:
    """One frame (C, H, W), a panel a channel, and the road map (H, W) beside them."""
    panels = [(layout.channel_name(c), frame[c]) for c in range(len(frame))] + [("road map", road_map)]
    height, width = road_map.shape
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4 * len(panels) * width / height, 4.6), squeeze=False, layout="constrained"
    )
    for axis, (name, image) in zip(axes[0], panels, strict=True):
        axis.imshow(image, vmin=0, vmax=max(float(np.quantile(image, 0.999)), 1 / 255), cmap="magma")
        axis.set_title(name, fontsize=10)
        axis.set_axis_off()
    figure.suptitle(title, fontsize=11)
    return figure


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=120)
    plt.close(figure)
