"""PredRNN++: Towards A Resolution of the Deep-in-Time Dilemma in Spatiotemporal Predictive Learning (Wang et al. 2018, ICML,
https://arxiv.org/abs/1804.06300).

It follows sections 4.1 and 4.2 and the authors' code, https://github.com/Yunbo426/predrnn-pp, without its layer norm.
Shapes: x is (B, N, H, W); h, c, m and z are (B, hidden, H, W).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from crevnet.networks.baselines.predrnn import FORGET_BIAS
from crevnet.networks.baselines.recurrent import StackedBaseline, StackedConfig
from crevnet.networks.crevnet.cells import CellState


class PredRNNPlusPlusState(NamedTuple):
    """The state that one step passes to the next."""

    cells: tuple[CellState, ...]
    """h and c of every layer."""
    memory: Tensor
    """The memory m from the top layer."""
    highway: Tensor
    """z of the gradient highway unit."""


@dataclass(frozen=True)
class PredRNNPlusPlusConfig(StackedConfig):
    """Configuration of PredRNN++."""

    title: ClassVar[str] = "PredRNN++"
    name: Literal["predrnnpp"] = "predrnnpp"


class PredRNNPlusPlus(StackedBaseline[PredRNNPlusPlusState]):
    """A stack of causal LSTM layers, with a gradient highway unit between the first two. The memory m passes as in PredRNN.

    The default has 35.0 million parameters: 4 layers of 128 channels with 5x5 convolutions. Implementations with 38.3 million
    have another convolution of [c, m] in every cell, which they never use.
    """

    def __init__(self, config: PredRNNPlusPlusConfig) -> None:
        super().__init__(config, CausalLSTMCell, bias=True)
        self.highway = GradientHighwayUnit(config.hidden, config.kernel)

    def initial_state(self, frame: Tensor) -> PredRNNPlusPlusState:
        zeros = self.zeros(frame)
        return PredRNNPlusPlusState((CellState(zeros, zeros),) * len(self.cells), zeros, zeros)

    def step(self, frame: Tensor, state: PredRNNPlusPlusState) -> tuple[Tensor, PredRNNPlusPlusState]:
        x, memory, highway, new = frame, state.memory, state.highway, []
        for number, (cell, old) in enumerate(zip(self.cells, state.cells, strict=True)):
            layer, memory = cell(x, old, memory)
            new.append(layer)
            x = layer.h
            if number == 0:
                x = highway = self.highway(x, highway)
        return self.to_frame(x), PredRNNPlusPlusState(tuple(new), memory, highway)


class CausalLSTMCell(nn.Module):
    """The causal LSTM: the gates of the spatial memory m depend on the new temporal memory c.

    Gates i, f, g of x, h and c give c = f c + i g. Gates i', f' of x, m and the new c, and g' of x and the new c, give
    m = f' tanh(W m) + i' g'. With o = tanh of x, h and the new c and m, h = o tanh(W [c, m]). Two details follow the code
    instead of the paper: g' does not depend on m, and o depends on h.
    """

    def __init__(self, channels: int, hidden: int, kernel: int) -> None:
        super().__init__()
        conv = partial(nn.Conv2d, kernel_size=kernel, padding=kernel // 2)
        self.from_input = conv(channels, 7 * hidden)  # i, f, g, i', f', g', o
        self.from_hidden = conv(hidden, 4 * hidden)  # i, f, g, o
        self.from_old_cell = conv(hidden, 3 * hidden)  # i, f, g
        self.from_old_memory = conv(hidden, 3 * hidden)  # i', f', and the input of f'
        self.from_cell = conv(hidden, 4 * hidden)  # i', f', g', o
        self.from_memory = conv(hidden, hidden)  # o
        self.merge_cell = nn.Conv2d(hidden, hidden, 1)
        self.merge_memory = nn.Conv2d(hidden, hidden, 1, bias=False)

    def forward(self, x: Tensor, state: CellState, memory: Tensor) -> tuple[CellState, Tensor]:
        ix, fx, gx, ix_, fx_, gx_, ox = self.from_input(x).chunk(7, 1)
        ih, fh, gh, oh = self.from_hidden(state.h).chunk(4, 1)
        ic, fc, gc = self.from_old_cell(state.c).chunk(3, 1)
        c = torch.sigmoid(fx + fh + fc + FORGET_BIAS) * state.c + torch.sigmoid(ix + ih + ic) * torch.tanh(gx + gh + gc)
        im, fm, mm = self.from_old_memory(memory).chunk(3, 1)
        ic, fc, gc, oc = self.from_cell(c).chunk(4, 1)
        kept, added = torch.sigmoid(fx_ + fm + fc + FORGET_BIAS), torch.sigmoid(ix_ + im + ic)
        m = kept * torch.tanh(mm) + added * torch.tanh(gx_ + gc)
        o = torch.tanh(ox + oh + oc + self.from_memory(m))
        return CellState(o * torch.tanh(self.merge_cell(c) + self.merge_memory(m)), c), m


class GradientHighwayUnit(nn.Module):
    """Gates p and s of x and z give z = s p + (1 - s) z, a short path for gradients through time."""

    def __init__(self, hidden: int, kernel: int) -> None:
        super().__init__()
        self.from_input = nn.Conv2d(hidden, 2 * hidden, kernel, padding=kernel // 2)
        self.from_highway = nn.Conv2d(hidden, 2 * hidden, kernel, padding=kernel // 2)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        p, s = (self.from_input(x) + self.from_highway(z)).chunk(2, 1)
        return torch.lerp(z, torch.tanh(p), torch.sigmoid(s))
