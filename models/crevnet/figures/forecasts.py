"""Figures (PNG) and animations (GIF) of forecasts."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from crevnet.data.files.layouts import Layout
from crevnet.figures.canvas import VALUE_COLORS, Frames, brightest, draw_frame, frame_grid
from crevnet.machine.files import replace_file

_BASELINE = "mean of last three"
"""The naive baseline in pictures, which needs only the input frames."""


def _baseline(past: Frames, horizon: int) -> Frames:
    return np.repeat(past[-3:].mean(0, keepdims=True), horizon, 0)


def _scored(lead: str, forecast: NDArray[np.floating], truth: NDArray[np.floating]) -> str:
    return f"{lead}, MSE {np.square(forecast - truth).mean():.2e}"


def forecast_figure(
    past: Frames, truth: Frames, forecast: Frames, title: str, layout: Layout, channel: int = 1
) -> Figure:
    """One column per predicted frame, for one channel.

    The rows are the last inputs, truth, prediction, a naive baseline and the prediction's error. Predictions have their scores.
    """
    horizon, true = len(truth), truth[:, channel]
    rows = {
        "input": past[-horizon:, channel],
        "truth": true,
        "prediction": forecast[:, channel],
        _BASELINE: _baseline(past, horizon)[:, channel],
        "error of the prediction": forecast[:, channel] - true,
    }
    scored = ("prediction", _BASELINE)
    highest = brightest(true)
    figure, axes = frame_grid(len(rows), horizon, *truth.shape[-2:])
    for row, (name, images) in zip(axes, rows.items(), strict=True):
        lowest = -highest if name.startswith("error") else 0
        for column, (axis, image) in enumerate(zip(row[-len(images) :], images, strict=True)):
            steps = column + 1 - (len(images) if name == "input" else 0)
            lead = layout.lead(steps) if steps else "now"
            lead = _scored(lead, image, true[column]) if name in scored else lead
            shown = draw_frame(axis, image, lowest, highest, lead)
        row[-len(images)].set_ylabel(name, fontsize=11)
        for axis in row[: -len(images)]:  # the model has fewer input frames than predicted ones
            axis.set_axis_off()
        unit = "error" if lowest else f"{layout.channel_name(channel)}, in [0, 1]"
        figure.colorbar(shown, ax=row.tolist(), fraction=0.04, label=unit)
    figure.suptitle(f"{title}: {layout.channel_name(channel)}", fontsize=11)
    return figure


def forecast_animation(
    past: Frames, truth: Frames, forecast: Frames, path: Path, layout: Layout, channel: int = 1
) -> None:
    """Write a GIF with truth, prediction and a naive baseline side by side: first the past frames, then the predicted ones."""
    shown = {"truth": truth, "prediction": forecast, _BASELINE: _baseline(past, len(truth))}
    videos = {name: np.concatenate((past, frames))[:, channel] for name, frames in shown.items()}
    true = videos["truth"]
    highest = brightest(true)
    figure, axes = plt.subplots(1, len(videos), figsize=(9.6, 4.1), layout="constrained")
    images = [
        axis.imshow(frames[0], vmin=0, vmax=highest, cmap=VALUE_COLORS)
        for axis, frames in zip(axes, videos.values(), strict=True)
    ]
    figure.colorbar(images[-1], ax=axes.tolist(), fraction=0.03, label=f"{layout.channel_name(channel)}, in [0, 1]")
    for axis in axes:
        axis.set_axis_off()

    def draw(t: int) -> None:
        is_input = t < len(past)
        for axis, image, (name, frames) in zip(axes, images, videos.items(), strict=True):
            image.set_data(frames[t])
            axis.set_title(name if is_input or name == "truth" else _scored(name, frames[t], true[t]), fontsize=11)
        figure.suptitle(f"{layout.lead(t + 1 - len(past))}, {'input' if is_input else 'predicted'}")

    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    pictures = []
    for t in range(len(true)):
        draw(t)
        canvas.draw()
        pictures.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))
    plt.close(figure)
    first, *others = pictures
    replace_file(path, partial(first.save, format="GIF", save_all=True, append_images=others, duration=333, loop=0))
