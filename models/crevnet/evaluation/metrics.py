"""How far a forecast is from the truth: MSE, MAE, PSNR and SSIM of every frame and channel.

Values are in [0, 1]. Each measure is taken of one channel of one frame at a time; all means are over such figures.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

MEASURES = ("mse", "mae", "psnr", "ssim")

LEAST_ERROR = 1e-10
"""PSNR takes a smaller MSE for this, so that a frame without an error has 100 dB and not infinitely many."""
_WINDOW = 11
"""Height and width of SSIM's Gaussian window, of a standard deviation of 1.5 pixels."""
SSIM_SIDE = _WINDOW // 2 + 1
"""The least height and width of frames that have an SSIM: those that can be reflected so far."""


def measure(forecast: Tensor, truth: Tensor) -> Tensor:
    """MEASURES, of forecast and truth (T, C, H, W): (4, T, C), float64.

    PSNR is 10 log10(1 / MSE) of the frame's channel, in decibels. SSIM is that of Wang et al. 2004 with K1 = 0.01 and
    K2 = 0.03 on values in [0, 1], in float32, the mean over all pixels: at the borders torchmetrics reflects the frame, so that
    those pixels count too. Frames with a side below 6 pixels, which cannot be reflected so far, have none: nan.
    """
    error = forecast.double() - truth.double()
    mse, mae = error.square().mean((2, 3)), error.abs().mean((2, 3))
    psnr = -10 * mse.clamp(min=LEAST_ERROR).log10()
    return torch.stack((mse, mae, psnr, _ssim(forecast.float(), truth.float()).double()))


def _ssim(forecast: Tensor, truth: Tensor) -> Tensor:
    """(T, C, H, W) -> (T, C)."""
    if min(truth.shape[2:]) < SSIM_SIDE:
        return truth.new_full(truth.shape[:2], torch.nan)
    _, pixels = structural_similarity_index_measure(forecast, truth, data_range=1.0, return_full_image=True)
    return pixels.mean((2, 3))
