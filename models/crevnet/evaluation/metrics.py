"""Measures of a forecast's error: MSE, MAE, PSNR and SSIM of each frame and channel.

Values are in [0, 1]. Each measure is computed for one channel of one frame; all means are means of these values.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

MEASURES = ("mse", "mae", "psnr", "ssim")

LEAST_ERROR = 1e-10
"""Lower bound of the MSE in PSNR, so that a frame without error has 100 dB instead of infinity."""
_WINDOW = 11
"""Height and width of SSIM's Gaussian window, in pixels; its standard deviation is 1.5 pixels."""
SSIM_SIDE = _WINDOW // 2 + 1
"""Smallest height and width of frames with an SSIM, because the window requires reflected borders."""


def measure(forecast: Tensor, truth: Tensor) -> Tensor:
    """The measures in MEASURES of `forecast` and `truth`, both (T, C, H, W): (4, T, C), float64.

    PSNR is 10 log10(1 / MSE) of the frame's channel, in decibels. SSIM is that of Wang et al. 2004 with K1 = 0.01 and
    K2 = 0.03 on values in [0, 1], in float32. It is the mean over all pixels: torchmetrics reflects the frame at the borders, so
    border pixels also count. Frames with a side below 6 pixels cannot be reflected and have NaN.
    """
    error = forecast.double() - truth.double()
    mse, mae = error.square().mean((2, 3)), error.abs().mean((2, 3))
    psnr = -10 * mse.clamp(min=LEAST_ERROR).log10()
    return torch.stack((mse, mae, psnr, _ssim(forecast.float(), truth.float()).double()))


def _ssim(forecast: Tensor, truth: Tensor) -> Tensor:
    """SSIM (T, C) of frames (T, C, H, W)."""
    if min(truth.shape[2:]) < SSIM_SIDE:
        return truth.new_full(truth.shape[:2], torch.nan)
    _, pixels = structural_similarity_index_measure(forecast, truth, data_range=1.0, return_full_image=True)
    return pixels.mean((2, 3))
