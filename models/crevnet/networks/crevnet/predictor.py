"""The predictor: reversible predictive modules that alternate between two streams (Yu et al. 2019, section 2.2).

Shapes: streams, states and memories are all (B, N, H, W), with N the channels of one latent stream. In a network of clips of K
frames they are (B, N, K, H, W).
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

Tensors = tuple[Tensor, ...]


class PredictorState(NamedTuple):
    """The state of the predictor: a named tuple passed from one time step to the next.

    Examples:
        >>> config = crevnet.CrevNetConfig(channels=1, static=(), blocks=(1,), strides=(2,), modules=2)
        >>> latent = torch.randn(1, 8, 4, 4), torch.randn(1, 8, 4, 4)
        >>> state = crevnet.Predictor(config).initial_state(latent)
        >>> len(state.cells), len(state.memories)
        (2, 2)
    """

    cells: tuple[CellState, ...]
    """The states h and c of each module."""
    memories: tuple[Tensor, ...]
    """The memory m returned by each module. In the next time step, the last entry is passed to the first module.

    The tuple is empty for ConvLSTM cells, which have no memory.
    """
    residuals: tuple[revflow.Residual, ...] = ()
    """In exact arithmetic, the residuals required to invert the modules. The tuple is empty unless `keep_residuals` is true."""


class ReversiblePredictiveModule(revflow.RecurrentCell):
    """A recurrent cell that maps (x1, x2) to ((1 - g) x2 + g h, x1), with h = ConvRNN(x1) and g = sigmoid(attention(h)).

    The state is (h, c). The memory is m for an ST-LSTM and empty for a ConvLSTM. The gate g is computed in float32, and 1 - g is
    computed as the sigmoid of the negated logit. If `grid` is given, the sum (1 - g) x2 + g h is rounded to the grid.

    Args:
        channels: number of channels per stream.
        cell: type of recurrent cell that computes h: `convlstm` or `st-lstm`.
        grid: grid for exact arithmetic, or None if exact arithmetic is not used.
        attention: network that computes the gate logit: `deep` or `pointwise`, as in `CrevNetConfig`.
        clip: number of frames per clip.

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
        self, streams: Tensors, state: Tensors, memory: Tensors, context: dict[str, Any]
    ) -> tuple[CellState, Tensors]:
        """Return the new state and the new memory, computed from the stream x1 and the previous state and memory."""
        new, left = self.cell(streams[0], CellState(*state), memory[0] if memory else None)
        return new, () if left is None else (left,)

    def mix(self, streams: Tensors, state: Tensors, context: dict[str, Any]) -> Latent:
        """Return the output streams, computed from the input streams and the new state."""
        x1, x2 = streams
        h = state[0]
        mixed = revflow.GatedCoupling.combine(x2, self.attention(h), h)
        return (mixed if self._grid is None else self._grid.round(mixed)), x1

    def inverse(
        self, streams: Latent, state: CellState, memory: Tensor | None, residual: revflow.Residual | None = None
    ) -> Latent:
        """Return the module's input streams, computed from its output streams and from the previous state and memory.

        The inverse divides by 1 - g, so its error in float32 is about 2⁻²³ / (1 - g) times the largest entry of x2 or h. If
        `residual` is given, the result is exact.
        """
        mixed, x1 = streams
        x2 = self._estimate(mixed, self.cell(x1, state, memory)[0].h)
        return x1, x2 if residual is None or self._grid is None else self._grid.restore(x2, residual)

    def residual(self, streams: Latent, outputs: Latent, h: Tensor) -> revflow.Residual:
        """Return the residual with which `inverse` recovers `streams` from `outputs` bit for bit. This method requires a grid."""
        assert self._grid is not None
        return self._grid.residual(streams[1], self._estimate(outputs[0], h))

    def _estimate(self, mixed: Tensor, h: Tensor) -> Tensor:
        x2 = revflow.GatedCoupling.separate(mixed, self.attention(h), h)
        return x2 if self._grid is None else self._grid.round(x2)


def _attention(kind: Attention, channels: int, clip: int) -> nn.Sequential:
    """The network from h to the gate's logit: deep in the authors' Traffic4cast code, pointwise in their Moving MNIST code."""
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
    """The predictor (P in eq. 1 of the paper), a stack of reversible predictive modules. Each call runs one time step.

    Each module passes its memory m up to the next module. The top module passes its memory to the first module in the
    next time step.

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
        """Return the state before the first time step: zeros with the same shape as the streams of `latent`."""
        zeros = torch.zeros_like(latent[0])
        memories = (zeros,) * len(self.stack) if self.has_memory else ()
        return PredictorState((CellState(zeros, zeros),) * len(self.stack), memories)

    def forward(
        self, latent: Latent, state: PredictorState, keep_residuals: bool = False
    ) -> tuple[Latent, PredictorState]:
        """Return the predicted latent of the next frame and the new state.

        If `keep_residuals` is true, the new state also contains residuals. This option requires exact arithmetic.
        """
        memories = tuple((m,) for m in state.memories) or ((),) * len(self.stack)
        outputs, (cells, left) = self.stack.step(latent, revflow.RecurrentState(state.cells, memories))
        residuals = tuple(self._residuals(latent, cells)) if keep_residuals else ()
        y1, y2 = outputs
        return (y1, y2), PredictorState(
            tuple(CellState(*c) for c in cells), tuple(m for ms in left for m in ms), residuals
        )

    @property
    def _predictive_modules(self) -> list[ReversiblePredictiveModule]:
        return [module for module in self.stack if isinstance(module, ReversiblePredictiveModule)]

    def _residuals(self, latent: Latent, cells: Iterable[Tensors]) -> Iterator[revflow.Residual]:
        """The residual of each module, from its new state."""
        for module, (h, c) in zip(self._predictive_modules, cells, strict=True):
            outputs = module.mix(latent, (h, c), {})
            yield module.residual(latent, outputs, h)
            latent = outputs

    def inverse(self, latent: Latent, before: PredictorState, after: PredictorState) -> Latent:
        """Recover the input latent of a time step from its output latent. This method is P⁻¹ in eq. 5 of the paper.

        If `after` contains residuals, the result is exact. Otherwise, the error in float32 is at most about 2 · 2⁻²⁴ · A · M if
        all gates are below 0.98. Here, A is the largest product of 1 / (1 - g) over the modules that change the same stream, and
        M is the largest entry of any stream or of h. For larger gates, errors also propagate through h to the other stream and
        grow faster. Because gates saturate during training, do not use this method to recompute activations. Use it to examine
        which information a trained model preserves, in float64 if necessary.

        Args:
            latent: the output latent of the time step.
            before: the state before the time step.
            after: the state after the time step. Only the memories between modules and the residuals are used.
        """
        entering: tuple[Tensor | None, ...] = (None,) * len(self.stack)
        if self.has_memory:
            entering = (before.memories[-1], *after.memories[:-1])
        residuals = after.residuals or (None,) * len(self.stack)
        for module, state, memory, residual in reversed(
            list(zip(self._predictive_modules, before.cells, entering, residuals, strict=True))
        ):
            latent = module.inverse(latent, state, memory, residual)
        return latent
