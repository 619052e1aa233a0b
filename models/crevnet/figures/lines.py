"""Line figures: learning curves, and errors by horizon and by hour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from crevnet.data.files.layouts import Layout
from crevnet.figures.canvas import MODEL, OTHERS
from crevnet.figures.curves import Curve

_MARKERS = "sD^vx"


def learning_curves_figure(loss: Curve, score: Curve, score_name: str, title: str) -> Figure:
    """The training loss and the validation score against optimizer steps.

    From 100 steps on, the figure also shows the running mean of the loss over a fiftieth of the steps.
    """
    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 5.6), sharex=True, layout="constrained")
    width = len(loss.values) // 50
    alpha = 0.35 if width > 1 else 1
    above.plot(loss.steps, loss.values, color=OTHERS[1], alpha=alpha, linewidth=0.8, label="each step")
    if width > 1:
        means = np.convolve(loss.values, np.full(width, 1 / width), "valid")
        above.plot(loss.steps[width - 1 :], means, color=OTHERS[1], label=f"mean of the last {width}")
    above.set_ylabel("training loss")
    below.plot(score.steps, score.values, color=MODEL, marker="o", markersize=4, label="after each epoch")
    best = int(np.nanargmin(score.values))
    below.plot(
        score.steps[best],
        score.values[best],
        "*",
        color=OTHERS[0],
        markersize=12,
        label=f"best, {score.values[best]:.3e}",
    )
    below.set_ylabel(f"validation {score_name}")
    below.set_xlabel("optimizer step")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in (above, below):
        axis.set_yscale("log")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
    figure.suptitle(f"{title}: learning curves", fontsize=11)
    return figure


def error_by_horizon_figure(
    errors: Mapping[str, NDArray[np.float64]], horizons: Sequence[int], title: str, layout: Layout
) -> Figure:
    """Mean squared errors of the predicted frames in `horizons`, 1 being the first.

    `errors` maps a forecast's name to its errors; the trained model comes first.
    """
    figure, axis = _error_figure(errors, horizons, f"{title}: error by horizon")
    axis.set_xticks(horizons, [layout.lead(horizon) for horizon in horizons], rotation=30)
    axis.set_xlabel("time after the last input frame")
    return figure


def error_by_hour_figure(errors: Mapping[str, NDArray[np.float64]], title: str) -> Figure:
    """Mean squared errors (24,) of the frames predicted in each hour of the day; NaN for hours without frames.

    `errors` maps a forecast's name to its errors; the trained model comes first.
    """
    figure, axis = _error_figure(errors, range(24), f"{title}: error by hour")
    axis.set_xticks(range(0, 24, 3), [f"{hour:02d}:00" for hour in range(0, 24, 3)])
    axis.set_xlim(-0.5, 23.5)
    axis.set_xlabel("hour of the predicted frame, in the files' time zone")
    return figure


def _error_figure(errors: Mapping[str, NDArray[np.float64]], places: Sequence[int], title: str) -> tuple[Figure, Axes]:
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    (model, found), *others = errors.items()
    for (name, values), color, marker in zip(others, OTHERS, _MARKERS, strict=False):
        axis.plot(places, values, color=color, marker=marker, markersize=4, linewidth=1, label=name)
    axis.plot(places, found, color=MODEL, marker="o", linewidth=2.5, label=model)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("mean squared error\n(values in [0, 1])")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure, axis
