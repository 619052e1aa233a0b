"""The predictor: reversible predictive modules that alternate between two streams (Yu et al. 2019, section 2.2).

Shapes: streams, states and memories are all (B, N, H, W), with N the channels of one latent stream, or (B, N, K, H, W) in a
network that sees clips of K frames.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import revflow
from crevnet.networks.config import Attention, CrevNetConfig
from crevnet.networks.convolution import convolution
from crevnet.networks.crevnet.autoencoder import Latent
from crevnet.networks.crevnet.cells import CELLS, CellState


class PredictorState(NamedTuple):
    """What a step leaves for the next one.

    Examples:
        >>> config = crevnet.CrevNetConfig(channels=1, static=(), blocks=(1,), strides=(2,), modules=2)
        >>> latent = torch.randn(1, 8, 4, 4), torch.randn(1, 8, 4, 4)
        >>> state = crevnet.Predictor(config).initial_state(latent)
        >>> len(state.cells), len(state.memories)
        (2, 2)
    """

    cells: tuple[CellState, ...]
    """h and c of every module."""
    memories: tuple[Tensor, ...]
    """The memory m that left every module; empty for ConvLSTM cells. The last one enters the first module's next step."""
    residuals: tuple[revflow.Residual, ...] = ()
    """What every module's inverse needs in exact arithmetic, if it was to be kept."""


class ReversiblePredictiveModule(revflow.RecurrentCell):
    """(x1, x2) -> ((1 - g) x2 + g h, x1), with h = ConvRNN(x1) and g = sigmoid(attention(h)). Its state is (h, c); its memory
    the m of an ST-LSTM, and nothing of a ConvLSTM.

    The gates are computed in float32, and 1 - g as the sigmoid of the negated logit. On a grid the sum is rounded to it.

    Examples:
        >>> module = crevnet.ReversiblePredictiveModule(8, "convlstm")
        >>> x1, x2, zeros = torch.randn(1, 8, 4, 4), torch.randn(1, 8, 4, 4), torch.zeros(1, 8, 4, 4)
        >>> state, memory = module.update((x1, x2), (zeros, zeros), (), {})
        >>> y1, y2 = module.mix((x1, x2), state, {})
        >>> torch.equal(y2, x1)
        True
    """

    def __init__(
        self,
        channels: int,
        cell: str,
        grid: revflow.Grid | None = None,
        attention: Attention = "deep",
        clip: int = 1,
    ) -> None:
        super().__init__()
        self._grid = grid
        self.cell = CELLS[cell](channels, clip)
        self.attention = _attention(attention, channels, clip)

    def update(
        self, streams: Latent, state: tuple[Tensor, ...], memory: tuple[Tensor, ...], context: dict[str, Any]
    ) -> tuple[CellState, tuple[Tensor, ...]]:
        new, left = self.cell(streams[0], CellState(*state), memory[0] if memory else None)
        return new, () if left is None else (left,)

    def mix(self, streams: Latent, state: tuple[Tensor, ...], context: dict[str, Any]) -> Latent:
        x1, x2 = streams
        h = state[0]
        mixed = revflow.GatedCoupling.combine(x2, self.attention(h), h)
        return (mixed if self._grid is None else self._grid.round(mixed)), x1

    def inverse(
        self, streams: Latent, state: CellState, memory: Tensor | None, residual: revflow.Residual | None = None
    ) -> Latent:
        """The module's input, from its output and the state and memory that it was given.

        Divides by 1 - g: in float32 an error of about 2⁻²³ / (1 - g) times the largest entry of x2 or h. With a `residual`
        there is none.
        """
        mixed, x1 = streams
        x2 = self._estimate(mixed, self.cell(x1, state, memory)[0].h)
        return x1, x2 if residual is None or self._grid is None else self._grid.restore(x2, residual)

    def residual(self, streams: Latent, outputs: Latent, h: Tensor) -> revflow.Residual:
        """In exact arithmetic: what `inverse` needs to make `streams` of the module's `outputs` to the last bit."""
        assert self._grid is not None
        return self._grid.residual(streams[1], self._estimate(outputs[0], h))

    def _estimate(self, mixed: Tensor, h: Tensor) -> Tensor:
        x2 = revflow.GatedCoupling.separate(mixed, self.attention(h), h)
        return x2 if self._grid is None else self._grid.round(x2)


def _attention(kind: Attention, channels: int, clip: int) -> nn.Sequential:
    """From h to the gate's logit: the authors' Traffic4cast code has the deep one, their Moving MNIST code the other."""
    if kind == "pointwise":
        return nn.Sequential(convolution(clip, channels, channels, 1))
    return nn.Sequential(
        convolution(clip, channels, channels, 1),
        nn.GroupNorm(1, channels),
        nn.ReLU(),
        convolution(clip, channels, channels, 3),
        nn.GroupNorm(1, channels),
        nn.ReLU(),
        convolution(clip, channels, channels, 1),
    )


class Predictor(nn.Module):
    """P of the paper's eq. 1: one time step of all modules. The memory m passes up through them, and from the top one to
    the first one of the next step.

    Examples:
        >>> config = crevnet.CrevNetConfig(channels=1, static=(), blocks=(1,), strides=(2,), modules=2)
        >>> predictor = crevnet.Predictor(config)
        >>> latent = torch.randn(1, 8, 4, 4), torch.randn(1, 8, 4, 4)
        >>> latent, state = predictor(latent, predictor.initial_state(latent))
        >>> latent[0].shape
        torch.Size([1, 8, 4, 4])
    """

    def __init__(self, config: CrevNetConfig) -> None:
        super().__init__()
        width = config.widths[-1]
        self.stack = revflow.ReversibleRecurrence(
            (
                ReversiblePredictiveModule(width, config.cell, config.grid, config.attention, config.clip)
                for _ in range(config.modules)
            ),
            states=config.states,
        )
        self.has_memory = CELLS[config.cell].has_memory

    def initial_state(self, latent: Latent) -> PredictorState:
        """All zeros, shaped for `latent`."""
        zeros = torch.zeros_like(latent[0])
        memories = (zeros,) * len(self.stack) if self.has_memory else ()
        return PredictorState((CellState(zeros, zeros),) * len(self.stack), memories)

    def forward(
        self, latent: Latent, state: PredictorState, keep_residuals: bool = False
    ) -> tuple[Latent, PredictorState]:
        """The next frame's latent, and the state for the next step; in exact arithmetic with residuals, if wanted."""
        memories = tuple((m,) for m in state.memories) or ((),) * len(self.stack)
        outputs, (cells, left) = self.stack.step(latent, revflow.RecurrentState(state.cells, memories))
        residuals = tuple(self._residuals(latent, cells)) if keep_residuals else ()
        return outputs, PredictorState(
            tuple(CellState(*c) for c in cells), tuple(m for ms in left for m in ms), residuals
        )

    def _residuals(self, latent: Latent, cells: Iterable[CellState]) -> Iterator[revflow.Residual]:
        """Those of each module, by its new state."""
        for module, (h, c) in zip(self.stack, cells, strict=True):
            outputs = module.mix(latent, (h, c), {})
            yield module.residual(latent, outputs, h)
            latent = outputs

    def inverse(self, latent: Latent, before: PredictorState, after: PredictorState) -> Latent:
        """P⁻¹ of eq. 5: the step's input from its output, the state before it and, of the state after it, the memories that
        went from one module to the next and the residuals. With residuals it is exact.

        Without, in float32 the error is at most about 2 · 2⁻²⁴ · A · M while gates stay below 0.98, with A the largest product of
        1 / (1 - g) over the modules that change one stream, and M the largest entry of a stream or h; beyond that errors
        also cross to the other stream through h and grow faster. Gates saturate as training goes on, so this serves to
        show what a trained model keeps (in float64, if need be), not to rebuild activations.
        """
        entering: tuple[Tensor | None, ...] = (None,) * len(self.stack)
        if self.has_memory:
            entering = (before.memories[-1], *after.memories[:-1])
        residuals = after.residuals or (None,) * len(self.stack)
        for module, *given in reversed(list(zip(self.stack, before.cells, entering, residuals, strict=True))):
            latent = module.inverse(latent, *given)
        return latent
