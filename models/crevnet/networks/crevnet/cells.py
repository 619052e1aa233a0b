"""Recurrent cells. States are arguments and results, never module attributes.

Shapes: x, h, c, m are all (B, N, H, W), with N the channels of one latent stream. In a network of clips of K frames they are
(B, N, K, H, W). Gates are 3x3 convolutions with bias, or 3x3x3 for clips. Gates with the same input are one convolution, with the
gates' channels in order. State dicts with one convolution per gate, such as `temporal.i.weight`, can also be loaded.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from crevnet.networks.convolution import convolution


class CellState(NamedTuple):
    """A cell's state after a time step."""

    h: Tensor
    c: Tensor


class ConvLSTMCell(nn.Module):
    """A ConvLSTM cell (Shi et al. 2015) without peephole connections.

    The gates i, f, g and o are computed from [x, h]. The new c is f c + i g, and the new h is o tanh(c).

    Examples:
        >>> from crevnet.networks.crevnet.cells import CellState
        >>> cell, zeros = crevnet.ConvLSTMCell(8), torch.zeros(1, 8, 4, 4)
        >>> (h, c), memory = cell(torch.randn(1, 8, 4, 4), CellState(zeros, zeros), None)
        >>> h.shape
        torch.Size([1, 8, 4, 4])
    """

    has_memory = False

    def __init__(self, channels: int, clip: int = 1) -> None:
        super().__init__()
        self.gates = convolution(clip, 2 * channels, 4 * channels, 3)
        nn.Module.register_load_state_dict_pre_hook(self, partial(_join, {"gates": "ifgo"}))

    def forward(self, x: Tensor, state: CellState, memory: Tensor | None) -> tuple[CellState, Tensor | None]:
        """Run one time step. Return the new state, and `memory` unchanged."""
        i, f, g, o = self.gates(torch.cat((x, state.h), 1)).chunk(4, 1)
        c = torch.sigmoid(f) * state.c + torch.sigmoid(i) * torch.tanh(g)
        return CellState(torch.sigmoid(o) * torch.tanh(c), c), memory


class STLSTMCell(nn.Module):
    """The spatiotemporal LSTM cell (ST-LSTM) used by CrevNet's authors, based on PredRNN (Wang et al. 2017).

    The gates i, f and g are computed from [x, h, c], and the new c is f c + i g. Using the new c, the gates i', f' and g' are
    computed from [x, m, c], and the new memory m is f' m + i' g'. Using the new c and m, the gate o is computed from
    [x, h, c, m], and the new h is o tanh(W [c, m]). Within one time step, each module passes its memory m up to the next module.

    Examples:
        >>> from crevnet.networks.crevnet.cells import CellState
        >>> cell, zeros = crevnet.STLSTMCell(8), torch.zeros(1, 8, 4, 4)
        >>> (h, c), memory = cell(torch.randn(1, 8, 4, 4), CellState(zeros, zeros), zeros)
        >>> memory.shape
        torch.Size([1, 8, 4, 4])
    """

    has_memory = True

    def __init__(self, channels: int, clip: int = 1) -> None:
        super().__init__()
        self.temporal = convolution(clip, 3 * channels, 3 * channels, 3)
        self.spatial = convolution(clip, 3 * channels, 3 * channels, 3)
        self.output = convolution(clip, 4 * channels, channels, 3)
        self.merge = convolution(clip, 2 * channels, channels, 1)
        nn.Module.register_load_state_dict_pre_hook(self, partial(_join, {"temporal": "ifg", "spatial": "ifg"}))

    def forward(self, x: Tensor, state: CellState, memory: Tensor | None) -> tuple[CellState, Tensor | None]:
        """Run one time step. Return the new state and the new memory m."""
        assert memory is not None
        c = _gated(self.temporal(torch.cat((x, state.h, state.c), 1)), state.c)
        m = _gated(self.spatial(torch.cat((x, memory, c), 1)), memory)
        o = torch.sigmoid(self.output(torch.cat((x, state.h, c, m), 1)))
        h = o * torch.tanh(self.merge(torch.cat((c, m), 1)))
        return CellState(h, c), m


CELLS: dict[str, type[ConvLSTMCell] | type[STLSTMCell]] = {"convlstm": ConvLSTMCell, "st-lstm": STLSTMCell}


def _gated(gates: Tensor, old: Tensor) -> Tensor:
    i, f, g = gates.chunk(3, 1)
    return torch.sigmoid(f) * old + torch.sigmoid(i) * torch.tanh(g)


def _join(convolutions: dict[str, str], cell: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Replace separate gates by their joint convolution, in a cell's state dict that has all of them."""
    for name, gates in convolutions.items():
        for kind in ("weight", "bias"):
            joined, parts = f"{prefix}{name}.{kind}", [f"{prefix}{name}.{gate}.{kind}" for gate in gates]
            if joined not in state_dict and all(part in state_dict for part in parts):
                state_dict[joined] = torch.cat([state_dict.pop(part) for part in parts])
