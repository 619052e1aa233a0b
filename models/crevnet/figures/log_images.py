"""Images of forecasts for TensorBoard's logs."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray

from crevnet.figures.canvas import ERROR_COLORS, VALUE_COLORS, Frames, brightest

_SHEET_PIXELS = 160


def forecast_sheet(truth: Frames, forecast: Frames, channel: int = 1) -> NDArray[np.uint8]:
    """A forecast as an image for logs, uint8 (height, width, 3): rows of truth, prediction and error, one column per frame.

    Larger frames are subsampled to at most 160 pixels per side.
    """
    true, predicted = truth[:, channel], forecast[:, channel]
    highest = brightest(true)
    step = -(-max(true.shape[1:]) // _SHEET_PIXELS)
    rows = [
        (true / highest, VALUE_COLORS),
        (predicted / highest, VALUE_COLORS),
        ((predicted - true) / highest / 2 + 0.5, ERROR_COLORS),
    ]
    pictures = [plt.get_cmap(name)(np.concatenate([*frames[:, ::step, ::step]], 1))[..., :3] for frames, name in rows]
    sheet: NDArray[np.uint8] = np.rint(np.concatenate(pictures) * 255).astype(np.uint8)
    return sheet
