"""PredNet: Deep Predictive Coding Networks for Video Prediction and Unsupervised Learning (Lotter et al. 2017,
https://arxiv.org/abs/1605.08104).

Shapes, with layers l from 0: targets A, predictions Â and representations R are (B, N_l, H / 2^l, W / 2^l); errors E are
(B, 2 N_l, H / 2^l, W / 2^l). N_0 is the number of channels of a frame, including static ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crevnet.networks.baselines.convlstm import lstm
from crevnet.networks.baselines.recurrent import RecurrentBaseline
from crevnet.networks.config import ModelConfig, check_at_least_one
from crevnet.networks.crevnet.cells import CellState


class PredNetState(NamedTuple):
    """The state that one step passes to the next."""

    cells: tuple[CellState, ...]
    """R, as h, and c of every layer."""
    expected: Tensor
    """Â of the first layer: the predicted next frame, (B, Ci, H, W)."""


@dataclass(frozen=True)
class PredNetConfig(ModelConfig):
    """Configuration of PredNet.

    Args:
        widths: channels of each layer above the first, which has the frame's channels. Frames are padded to multiples of
            2^len(widths). The default is the paper's network for natural video, with 6.9 million parameters.
    """

    title: ClassVar[str] = "PredNet"
    name: Literal["prednet"] = "prednet"
    widths: tuple[int, ...] = (48, 96, 192)

    def __post_init__(self) -> None:
        super().__post_init__()
        for width in self.widths:
            check_at_least_one("widths", width)


class PredNet(RecurrentBaseline[PredNetConfig, PredNetState]):
    """A hierarchy of layers; each predicts its input and passes only the prediction error to the next layer.

    In the paper's algorithm 1, a time step first goes down from the top layer to update the representations. It then goes up
    with the frame to compute the errors. Here `step` goes up with a frame and then down for the next prediction;
    `initial_state` is the first pass down. Gates are sigmoids, as in the paper (the authors' code has hard sigmoids).

    The loss is the squared error of predicted frames, as for the other recurrent models. The paper's loss is the mean of the
    first layer's errors ("L_0"), which is an absolute error, or of all layers' errors ("L_all"). Predictions saturate at 0 and
    1 (SatLU).
    """

    def __init__(self, config: PredNetConfig) -> None:
        super().__init__(config, multiple=2 ** len(config.widths))
        self.widths = (config.input_channels, *config.widths)
        above = (*config.widths, None)
        self.representations = nn.ModuleList(Representation(n, up) for n, up in zip(self.widths, above, strict=True))
        self.predictions = nn.ModuleList(nn.Conv2d(n, n, 3, padding=1) for n in self.widths)
        self.targets = nn.ModuleList(nn.Conv2d(2 * n, up, 3, padding=1) for n, up in pairwise(self.widths))

    def initial_state(self, frame: Tensor) -> PredNetState:
        batch, _, height, width = frame.shape
        zeros = [frame.new_zeros(batch, n, height >> level, width >> level) for level, n in enumerate(self.widths)]
        return self._down([torch.cat((z, z), 1) for z in zeros], tuple(CellState(z, z) for z in zeros))

    def step(self, frame: Tensor, state: PredNetState) -> tuple[Tensor, PredNetState]:
        state = self._down(self._up(frame, state), state.cells)
        return state.expected[:, : self.config.channels], state

    def _up(self, frame: Tensor, state: PredNetState) -> list[Tensor]:
        """The errors E of every layer, from the first layer up (eqs. 1 to 3)."""
        errors = [_errors(frame, state.expected)]
        for convolution, predict, cell in zip(self.targets, self.predictions[1:], state.cells[1:], strict=True):
            target = F.max_pool2d(F.relu(convolution(errors[-1])), 2)
            errors.append(_errors(target, F.relu(predict(cell.h))))
        return errors

    def _down(self, errors: Sequence[Tensor], cells: Sequence[CellState]) -> PredNetState:
        """The new representations, each from its layer's errors and the new one above (eq. 4), and the next frame."""
        new: list[CellState] = []
        for update, error, old in zip(reversed(self.representations), reversed(errors), reversed(cells), strict=True):
            new.append(update(error, old, new[-1].h if new else None))
        expected = self.predictions[0](new[-1].h).clamp(0, 1)
        return PredNetState(tuple(reversed(new)), expected)


class Representation(nn.Module):
    """R of one layer: a ConvLSTM of E, R and, except in the top layer, the upsampled R of the layer above."""

    def __init__(self, channels: int, above: int | None) -> None:
        super().__init__()
        self.from_errors = nn.Conv2d(2 * channels, 4 * channels, 3, padding=1)
        self.from_hidden = nn.Conv2d(channels, 4 * channels, 3, padding=1, bias=False)
        self.from_above = None if above is None else nn.Conv2d(above, 4 * channels, 3, padding=1, bias=False)

    def forward(self, errors: Tensor, state: CellState, above: Tensor | None) -> CellState:
        gates = self.from_errors(errors) + self.from_hidden(state.h)
        if self.from_above is not None and above is not None:
            gates = gates + self.from_above(F.interpolate(above, scale_factor=2))
        return lstm(gates, state.c)


def _errors(target: Tensor, prediction: Tensor) -> Tensor:
    difference = target - prediction
    return F.relu(torch.cat((difference, -difference), 1))
