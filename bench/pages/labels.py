"""Labels next to points: each at the first place near its point that covers neither points nor other labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import cos, pi, sin
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

from pages.style import SMALL

DISTANCES = (5, 8, 14, 22, 32, 44, 58, 74)
"""From a point to its label's edge, in points."""
DIRECTIONS = [k * pi / 8 for k in (4, 12, 0, 8, 2, 14, 6, 10, 3, 13, 5, 11, 1, 15, 7, 9)]
"""Above and below first."""
AROUND = 4.0
"""Half the width of the square that a point takes, in points."""


class Label(NamedTuple):
    """A text and the point that it names, in data coordinates."""

    text: str
    point: tuple[float, float]
    color: str


def place(axes: Axes, labels: Sequence[Label], points: Iterable[tuple[float, float]]) -> None:
    """Draw the labels, the most crowded last. `points` are those that no label may cover. Call it when all else is drawn."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # the layout, which sizes the axes
    scale = figure.dpi / 72
    taken = [_square(axes, point, AROUND * scale) for point in points]
    inside = axes.get_window_extent()
    for label in labels:
        texts = axes.annotate(label.text, label.point, fontsize=SMALL)
        size = texts.get_window_extent()
        texts.remove()
        offset, box = next(
            (
                (offset, box)
                for offset, box in _candidates(axes, label, (size.width, size.height), scale)
                if _is_within(box, inside) and not any(box.overlaps(other) for other in taken)
            ),
            ((0.0, 12.0), size),
        )
        taken.append(box)
        is_far = max(abs(offset[0]) - size.width / scale / 2, abs(offset[1]) - size.height / scale / 2) > 12
        axes.annotate(
            label.text, label.point, offset, textcoords="offset points", ha="center", va="center", fontsize=SMALL,
            color=label.color, in_layout=False,
            arrowprops={"arrowstyle": "-", "color": label.color, "linewidth": 0.7, "shrinkB": 4} if is_far else None,
        )  # fmt: skip


def _candidates(
    axes: Axes, label: Label, size: tuple[float, float], scale: float
) -> Iterator[tuple[tuple[float, float], Bbox]]:
    """Offsets of a label's center in points, and the box that it then takes in pixels."""
    x, y = axes.transData.transform(label.point)
    width, height = size
    for distance in DISTANCES:
        for angle in DIRECTIONS:
            right, up = cos(angle), sin(angle)
            dx = right * distance * scale + width / 2 * np.sign(round(right, 6)) * min(1.0, 2 * abs(right))
            dy = up * distance * scale + height / 2 * np.sign(round(up, 6))
            yield (dx / scale, dy / scale), Bbox.from_bounds(x + dx - width / 2, y + dy - height / 2, width, height)


def _square(axes: Axes, point: tuple[float, float], half: float) -> Bbox:
    x, y = axes.transData.transform(point)
    return Bbox.from_extents(x - half, y - half, x + half, y + half)


def _is_within(box: Bbox, outer: Bbox) -> bool:
    return bool(box.x0 >= outer.x0 and box.x1 <= outer.x1 and box.y0 >= outer.y0 and box.y1 <= outer.y1)
