"""Figures of single frames of a day."""

from __future__ import annotations

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from crevnet.data.files.layouts import Layout
from crevnet.figures.canvas import VALUE_COLORS, Frames, brightest


def day_figure(frame: Frames, road_map: Frames, title: str, layout: Layout) -> Figure:
    """One frame (C, H, W), one panel per channel, and the road map (H, W)."""
    panels = [(layout.channel_name(c), frame[c]) for c in range(len(frame))] + [("road map", road_map)]
    height, width = road_map.shape
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4 * len(panels) * width / height, 4.6), squeeze=False, layout="constrained"
    )
    for axis, (name, image) in zip(axes[0], panels, strict=True):
        axis.imshow(image, vmin=0, vmax=brightest(image), cmap=VALUE_COLORS)
        axis.set_title(name, fontsize=10)
        axis.set_axis_off()
    figure.suptitle(title, fontsize=11)
    return figure
