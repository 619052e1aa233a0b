"""Couplings of convolutions, for the scripts that time or check module stacks."""

from __future__ import annotations

from torch import Tensor, nn

import revflow


def conditioner(channels: int, outputs: int = 1) -> nn.Sequential:
    """conv3x3, GroupNorm, SiLU, conv3x3, with `outputs` times the channels."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.GroupNorm(8, channels),
        nn.SiLU(),
        nn.Conv2d(channels, outputs * channels, 3, padding=1),
    )


class Halves(nn.Module):
    """Splits the channels into two tensors."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.chunk(2, 1)


def additive(channels: int) -> nn.Module:
    return revflow.AdditiveCoupling(conditioner(channels))


def gated(channels: int) -> nn.Module:
    return revflow.GatedCoupling(nn.Sequential(conditioner(channels, 2), Halves()))
