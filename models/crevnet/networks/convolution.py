"""The convolutions of CrevNet: over an image, or over a clip of consecutive frames at once."""

from __future__ import annotations

import torch
from torch import nn


def convolution(
    clip: int, inputs: int, outputs: int, size: int, stride: int = 1, bias: bool = True
) -> nn.Conv2d | nn.Conv3d:
    """size x size over images (B, inputs, H, W); where a `clip` has several frames, size x size x size over clips
    (B, inputs, clip, H, W), of which `stride` makes height and width smaller, but leaves out no frame."""
    if clip == 1:
        return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=bias)
    return nn.Conv3d(inputs, outputs, size, (1, stride, stride), padding=size // 2, bias=bias)


def channels_last(clip: int) -> torch.memory_format:
    """The layout in which tensor cores take such convolutions."""
    return torch.channels_last if clip == 1 else torch.channels_last_3d
