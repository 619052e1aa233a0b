"""CrevNet's convolutions, over single frames or over clips of consecutive frames."""

from __future__ import annotations

import torch
from torch import nn


def convolution(
    clip: int, inputs: int, outputs: int, size: int, stride: int = 1, bias: bool = True
) -> nn.Conv2d | nn.Conv3d:
    """A size x size convolution over images (B, inputs, H, W), or size x size x size over clips (B, inputs, clip, H, W).

    The latter is for a `clip` of several frames; `stride` then applies only to height and width.
    """
    if clip == 1:
        return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=bias)
    return nn.Conv3d(inputs, outputs, size, (1, stride, stride), padding=size // 2, bias=bias)


def channels_last(clip: int) -> torch.memory_format:
    """The memory format that tensor cores require for these convolutions."""
    return torch.channels_last if clip == 1 else torch.channels_last_3d
