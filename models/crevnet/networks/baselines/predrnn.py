"""PredRNN: Recurrent Neural Networks for Predictive Learning using Spatiotemporal LSTMs (Wang et al. 2017, NeurIPS).

It follows section 3.2 and the authors' code, https://github.com/thuml/predrnn-pytorch, without its layer norm.
Shapes: x is (B, N, H, W); h, c and m are (B, hidden, H, W).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from crevnet.networks.baselines.recurrent import StackedBaseline, StackedConfig
from crevnet.networks.crevnet.cells import CellState

FORGET_BIAS = 1.0


class PredRNNState(NamedTuple):
    """The state that one step passes to the next."""

    cells: tuple[CellState, ...]
    """h and c of every layer."""
    memory: Tensor
    """The memory m from the top layer."""


@dataclass(frozen=True)
class PredRNNConfig(StackedConfig):
    """Configuration of PredRNN."""

    title: ClassVar[str] = "PredRNN"
    name: Literal["predrnn"] = "predrnn"


class PredRNN(StackedBaseline[PredRNNState]):
    """A stack of ST-LSTM layers. The memory m passes up through the layers, and from the top layer to the next step's first.

    The default has 23.5 million parameters: 4 layers of 128 channels with 5x5 convolutions, without biases as in the code.
    """

    def __init__(self, config: PredRNNConfig) -> None:
        super().__init__(config, STLSTMCell, bias=False)

    def initial_state(self, frame: Tensor) -> PredRNNState:
        zeros = self.zeros(frame)
        return PredRNNState((CellState(zeros, zeros),) * len(self.cells), zeros)

    def step(self, frame: Tensor, state: PredRNNState) -> tuple[Tensor, PredRNNState]:
        x, memory, new = frame, state.memory, []
        for cell, old in zip(self.cells, state.cells, strict=True):
            layer, memory = cell(x, old, memory)
            new.append(layer)
            x = layer.h
        return self.to_frame(x), PredRNNState(tuple(new), memory)


class STLSTMCell(nn.Module):
    """The spatiotemporal LSTM.

    Gates i, f, g of x and h give c = f c + i g. Gates i', f', g' of x and m give m = f' m + i' g'. With o of x, h and the new c
    and m, h = o tanh(W [c, m]).
    """

    def __init__(self, channels: int, hidden: int, kernel: int) -> None:
        super().__init__()
        conv = partial(nn.Conv2d, kernel_size=kernel, padding=kernel // 2, bias=False)
        self.from_input = conv(channels, 7 * hidden)  # i, f, g, i', f', g', o
        self.from_hidden = conv(hidden, 4 * hidden)  # i, f, g, o
        self.from_memory = conv(hidden, 3 * hidden)  # i', f', g'
        self.output_from_cell = conv(hidden, hidden)
        self.output_from_memory = conv(hidden, hidden)
        self.merge_cell = nn.Conv2d(hidden, hidden, 1, bias=False)
        self.merge_memory = nn.Conv2d(hidden, hidden, 1, bias=False)

    def forward(self, x: Tensor, state: CellState, memory: Tensor) -> tuple[CellState, Tensor]:
        ix, fx, gx, ix_, fx_, gx_, ox = self.from_input(x).chunk(7, 1)
        ih, fh, gh, oh = self.from_hidden(state.h).chunk(4, 1)
        im, fm, gm = self.from_memory(memory).chunk(3, 1)
        c = torch.sigmoid(fx + fh + FORGET_BIAS) * state.c + torch.sigmoid(ix + ih) * torch.tanh(gx + gh)
        m = torch.sigmoid(fx_ + fm + FORGET_BIAS) * memory + torch.sigmoid(ix_ + im) * torch.tanh(gx_ + gm)
        o = torch.sigmoid(ox + oh + self.output_from_cell(c) + self.output_from_memory(m))
        return CellState(o * torch.tanh(self.merge_cell(c) + self.merge_memory(m)), c), m
