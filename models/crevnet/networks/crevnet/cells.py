"""Recurrent cells: states are values that come in and go out, never kept on a module.

Shapes: x, h, c, m are all (B, N, H, W), with N the channels of one latent stream, or (B, N, K, H, W) in a network that sees
clips of K frames. Gates are 3x3 convolutions with bias, 3x3x3 of clips.
Gates of one input are one convolution, with the gates' channels one after the other. State dicts in which each gate is a
convolution of its own, `temporal.i.weight` say, load too.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from crevnet.networks.convolution import convolution


class CellState(NamedTuple):
    """A cell's state after a step."""

    h: Tensor
    c: Tensor


class ConvLSTMCell(nn.Module):
    """ConvLSTM (Shi et al. 2015), without peepholes: i, f, g, o from [x, h]; c = f c + i g; h = o tanh(c).

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
        self.register_load_state_dict_pre_hook(partial(_join, {"gates": "ifgo"}))

    def forward(self, x: Tensor, state: CellState, memory: Tensor | None) -> tuple[CellState, Tensor | None]:
        i, f, g, o = self.gates(torch.cat((x, state.h), 1)).chunk(4, 1)
        c = torch.sigmoid(f) * state.c + torch.sigmoid(i) * torch.tanh(g)
        return CellState(torch.sigmoid(o) * torch.tanh(c), c), memory


class STLSTMCell(nn.Module):
    """The spatiotemporal LSTM of CrevNet's authors, after PredRNN (Wang et al. 2017).

    i, f, g from [x, h, c] give c = f c + i g; i', f', g' from [x, m, c] give m = f' m + i' g', with the new c;
    o from [x, h, c, m]; h = o tanh(W [c, m]). The memory m passes up through the modules of one step.

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
        self.register_load_state_dict_pre_hook(partial(_join, {"temporal": "ifg", "spatial": "ifg"}))

    def forward(self, x: Tensor, state: CellState, memory: Tensor | None) -> tuple[CellState, Tensor | None]:
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
    """Replace the gates of each convolution by the convolution, in a cell's state dict that has all of them."""
    for name, gates in convolutions.items():
        for kind in ("weight", "bias"):
            joined, parts = f"{prefix}{name}.{kind}", [f"{prefix}{name}.{gate}.{kind}" for gate in gates]
            if joined not in state_dict and all(part in state_dict for part in parts):
                state_dict[joined] = torch.cat([state_dict.pop(part) for part in parts])
