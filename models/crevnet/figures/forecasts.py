"""Figures, animations and log images of forecasts, and figures of single frames."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from crevnet.data.files.layouts import Layout
from crevnet.figures.canvas import ERRORS, VALUES, Frames, brightest, draw_frame, frame_grid
from crevnet.machine.files import replace_file

_SHEET_PIXELS = 160


def forecast_figure(
    past: Frames, truth: Frames, forecast: Frames, title: str, layout: Layout, channel: int = 1
) -> Figure:
    """One column per predicted frame, for one channel. The rows are the last inputs, truth, prediction and error."""
    horizon = len(truth)
    rows = [
        ("input", past[-horizon:, channel]),
        ("truth", truth[:, channel]),
        ("prediction", forecast[:, channel]),
        ("error", forecast[:, channel] - truth[:, channel]),
    ]
    highest = brightest(truth[:, channel])
    figure, axes = frame_grid(len(rows), horizon, *truth.shape[-2:])
    for row, (name, images) in zip(axes, rows, strict=True):
        lowest = -highest if name == "error" else 0
        for column, (axis, image) in enumerate(zip(row[-len(images) :], images, strict=True)):
            steps = column + 1 - (len(images) if name == "input" else 0)
            shown = draw_frame(axis, image, lowest, highest, layout.lead(steps) if steps else "now")
        row[-len(images)].set_ylabel(name, fontsize=11)
        for axis in row[: -len(images)]:  # the model has fewer input frames than predicted ones
            axis.set_axis_off()
        figure.colorbar(shown, ax=row.tolist(), fraction=0.04)
    figure.suptitle(f"{title}: {layout.channel_name(channel)}", fontsize=11)
    return figure


def forecast_animation(
    past: Frames, truth: Frames, forecast: Frames, path: Path, layout: Layout, channel: int = 1
) -> None:
    """Write a GIF with truth and prediction side by side: first the past frames, then the predicted ones."""
    left, right = np.concatenate((past, truth))[:, channel], np.concatenate((past, forecast))[:, channel]
    highest = brightest(left)
    figure, axes = plt.subplots(1, 2, figsize=(7, 4), layout="constrained")
    images = [
        axis.imshow(frames[0], vmin=0, vmax=highest, cmap=VALUES)
        for axis, frames in zip(axes, (left, right), strict=True)
    ]
    for axis, name in zip(axes, ("truth", "prediction"), strict=True):
        axis.set_axis_off()
        axis.set_title(name)

    def draw(t: int) -> None:
        for image, frames in zip(images, (left, right), strict=True):
            image.set_data(frames[t])
        lead, kind = layout.lead(t + 1 - len(past)), "input" if t < len(past) else "predicted"
        figure.suptitle(f"{lead}, {kind}: {layout.channel_name(channel)}")

    pictures = []
    for t in range(len(left)):
        draw(t)
        figure.canvas.draw()
        pictures.append(Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB"))
    plt.close(figure)
    first, *others = pictures
    replace_file(path, partial(first.save, format="GIF", save_all=True, append_images=others, duration=333, loop=0))


def day_figure(frame: Frames, road_map: Frames, title: str, layout: Layout) -> Figure:
    """One frame (C, H, W), one panel per channel, and the road map (H, W)."""
    panels = [(layout.channel_name(c), frame[c]) for c in range(len(frame))] + [("road map", road_map)]
    height, width = road_map.shape
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4 * len(panels) * width / height, 4.6), squeeze=False, layout="constrained"
    )
    for axis, (name, image) in zip(axes[0], panels, strict=True):
        axis.imshow(image, vmin=0, vmax=brightest(image), cmap=VALUES)
        axis.set_title(name, fontsize=10)
        axis.set_axis_off()
    figure.suptitle(title, fontsize=11)
    return figure


def forecast_sheet(truth: Frames, forecast: Frames, channel: int = 1) -> NDArray[np.uint8]:
    """A forecast as an image for logs, uint8 (height, width, 3): rows of truth, prediction and error, one column per frame.

    Larger frames are subsampled to at most 160 pixels per side.
    """
    true, predicted = truth[:, channel], forecast[:, channel]
    highest = brightest(true)
    step = -(-max(true.shape[1:]) // _SHEET_PIXELS)
    rows = [(true / highest, VALUES), (predicted / highest, VALUES), ((predicted - true) / highest / 2 + 0.5, ERRORS)]
    pictures = [plt.get_cmap(name)(np.concatenate([*frames[:, ::step, ::step]], 1))[..., :3] for frames, name in rows]
    return np.rint(np.concatenate(pictures) * 255).astype(np.uint8)
