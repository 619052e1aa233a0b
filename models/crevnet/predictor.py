"""The predictor: reversible predictive modules that alternate between two streams (Yu et al. 2019, section 2.2).

Shapes: streams, states and memories are all (B, N, H, W), with N the channels of one latent stream.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

import revflow
from crevnet.autoencoder import Latent
from crevnet.cells import CELLS, CellState
from crevnet.config import CrevNetConfig


class PredictorState(NamedTuple):
    """What a step leaves for the next one."""

    cells: tuple[CellState, ...]
    """h and c of every module."""
    memories: tuple[Tensor, ...]
    """The memory m that left every module; empty for ConvLSTM cells. The last one enters the first module's next step."""


class ReversiblePredictiveModule(nn.Module):
    """(x1, x2) -> ((1 - g) x2 + g h, x1), with h = ConvRNN(x1) and g = sigmoid(attention(h)).

    The gates are computed in float32, and 1 - g as the sigmoid of the negated logit.
    """

    def __init__(self, channels: int, cell: str) -> None:
        super().__init__()
        self.cell = CELLS[cell](channels)
        self.attention = nn.Sequential(
            nn.Conv2d(channels, channels, 1),
            nn.GroupNorm(1, channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(1, channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1),
        )

    def forward(
        self, streams: Latent, state: CellState, memory: Tensor | None
    ) -> tuple[Latent, CellState, Tensor | None]:
        x1, x2 = streams
        state, memory = self.cell(x1, state, memory)
        mixed = revflow.GatedCoupling.combine(x2, self.attention(state.h), state.h)
        return (mixed, x1), state, memory

    def inverse(self, streams: Latent, state: CellState, memory: Tensor | None) -> Latent:
        """The module's input, from its output and the state and memory that it was given.

        Divides by 1 - g: in float32 an error of about 2⁻²³ / (1 - g) times the largest entry of x2 or h.
        """
        mixed, x1 = streams
        h = self.cell(x1, state, memory)[0].h
        return x1, revflow.GatedCoupling.separate(mixed, self.attention(h), h)


class Predictor(nn.Module):
    """P of the paper's eq. 1: one time step of all modules. The memory m passes up through them, and from the top one to
    the first one of the next step."""

    def __init__(self, config: CrevNetConfig) -> None:
        super().__init__()
        width = config.widths[-1]
        self.stack = nn.ModuleList(ReversiblePredictiveModule(width, config.cell) for _ in range(config.modules))
        self.has_memory = CELLS[config.cell].has_memory

    def initial_state(self, latent: Latent) -> PredictorState:
        """All zeros, shaped for `latent`."""
        zeros = torch.zeros_like(latent[0])
        memories = (zeros,) * len(self.stack) if self.has_memory else ()
        return PredictorState((CellState(zeros, zeros),) * len(self.stack), memories)

    def forward(self, latent: Latent, state: PredictorState) -> tuple[Latent, PredictorState]:
        """The next frame's latent, and the state for the next step."""
        memory = state.memories[-1] if self.has_memory else None
        cells, memories = [], []
        for module, cell in zip(self.stack, state.cells, strict=True):
            latent, cell, memory = module(latent, cell, memory)
            cells.append(cell)
            memories.append(memory)
        return latent, PredictorState(tuple(cells), tuple(memories) if self.has_memory else ())

    def inverse(self, latent: Latent, before: PredictorState, after: PredictorState) -> Latent:
        """P⁻¹ of eq. 5: the step's input from its output, the state before it and the memories (of `after`, the state
        after it) that went from one module to the next.

        In float32 the error is at most about 2 · 2⁻²⁴ · A · M while gates stay below 0.98, with A the largest product of
        1 / (1 - g) over the modules that change one stream, and M the largest entry of a stream or h; beyond that errors
        also cross to the other stream through h and grow faster. Gates saturate as training goes on, so this serves to
        show what a trained model keeps (in float64, if need be), not to rebuild activations.
        """
        entering: tuple[Tensor | None, ...] = (None,) * len(self.stack)
        if self.has_memory:
            entering = (before.memories[-1], *after.memories[:-1])
        for module, cell, memory in zip(reversed(self.stack), reversed(before.cells), reversed(entering), strict=True):
            latent = module.inverse(latent, cell, memory)
        return latent
