"""ConvLSTM: A Machine Learning Approach for Precipitation Nowcasting (Shi et al. 2015, https://arxiv.org/abs/1506.04214).

Shapes: x is (B, N, H, W); h and c are (B, hidden, H, W).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from crevnet.networks.baselines.recurrent import StackedBaseline, StackedConfig
from crevnet.networks.crevnet.cells import CellState


@dataclass(frozen=True)
class ConvLSTMConfig(StackedConfig):
    """Configuration of ConvLSTM."""

    title: ClassVar[str] = "ConvLSTM"
    name: Literal["convlstm"] = "convlstm"


class ConvLSTM(StackedBaseline[tuple[CellState, ...]]):
    """A stack of ConvLSTM layers. The input of each layer is the hidden state of the layer below.

    The default has 11.5 million parameters: 4 layers of 128 channels with 5x5 convolutions.
    """

    def __init__(self, config: ConvLSTMConfig) -> None:
        super().__init__(config, ConvLSTMCell, bias=True)

    def initial_state(self, frame: Tensor) -> tuple[CellState, ...]:
        zeros = self.zeros(frame)
        return (CellState(zeros, zeros),) * len(self.cells)

    def step(self, frame: Tensor, state: tuple[CellState, ...]) -> tuple[Tensor, tuple[CellState, ...]]:
        x, new = frame, []
        for cell, old in zip(self.cells, state, strict=True):
            new.append(cell(x, old))
            x = new[-1].h
        return self.to_frame(x), tuple(new)


class ConvLSTMCell(nn.Module):
    """Eq. 3 of the paper without peepholes (the terms in W ∘ c): i, f, g and o are convolutions of x and h."""

    def __init__(self, channels: int, hidden: int, kernel: int) -> None:
        super().__init__()
        # Here and in the other cells, each input has its own convolution: one over [x, h] would store a copy of both.
        self.from_input = nn.Conv2d(channels, 4 * hidden, kernel, padding=kernel // 2)
        self.from_hidden = nn.Conv2d(hidden, 4 * hidden, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor, state: CellState) -> CellState:
        return lstm(self.from_input(x) + self.from_hidden(state.h), state.c)


def lstm(gates: Tensor, c: Tensor) -> CellState:
    """c = f c + i g and h = o tanh(c), from the pre-activations of i, f, g and o, (B, 4 hidden, H, W)."""
    i, f, g, o = gates.chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return CellState(torch.sigmoid(o) * torch.tanh(c), c)
