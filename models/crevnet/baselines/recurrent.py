"""Baselines that go from frame to frame with a state.

Shapes: as in crevnet.baselines.baseline; p the patch, and Hp x Wp the frame, padded at the bottom and the right.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crevnet.baselines.baseline import (
    Baseline,
    Task,
    check_at_least_one,
    cropped,
    mean_squared_error,
    padded,
    with_static,
)

State = TypeVar("State")


class RecurrentBaseline(Baseline, Generic[State]):
    """One step predicts the next frame from this one and a state; the state comes in and goes out, and is never kept on a module.

    A subclass gives `initial_state` and `step`. They see frames with the static channels, padded to multiples of `multiple` and
    folded into patches: (B, Ci p p, Hp / p, Wp / p).
    """

    def __init__(self, task: Task, multiple: int) -> None:
        super().__init__(task)
        self.multiple = multiple

    @abstractmethod
    def initial_state(self, frame: Tensor) -> State:
        """The state before the first step, shaped for `frame` (B, Ci p p, Hp / p, Wp / p), of which no value is used."""

    @abstractmethod
    def step(self, frame: Tensor, state: State) -> tuple[Tensor, State]:
        """(B, Ci p p, Hp / p, Wp / p) -> the next frame's data channels, (B, C p p, Hp / p, Wp / p), and the next state."""

    def forward(self, frames: Tensor, static: Tensor | None = None) -> Tensor:
        """One-step predictions (B, T, C, H, W): entry t is the frame after frame t, from the true frames up to t."""
        self._check(frames, static)
        return torch.stack(list(self._predictions(frames, static)), 1)

    def loss(self, frames: Tensor, static: Tensor | None = None) -> Tensor:
        """Mean squared error of all one-step predictions within the window, from true frames."""
        self._check(frames, static, at_least=2)
        # Step by step: a stack of all predictions, and its gradient, would each take a frame a step more.
        predictions, truth = self._predictions(frames[:, :-1], static), frames[:, 1:].unbind(1)
        return torch.stack([mean_squared_error(p, t) for p, t in zip(predictions, truth, strict=True)]).mean()

    @torch.no_grad()
    def generate(self, past: Tensor, static: Tensor | None = None, horizon: int | None = None) -> Tensor:
        """The frames after `past`, each predicted from the one before: (B, horizon, C, H, W), not clipped."""
        self._check(past, static)
        horizon, state = self._horizon(horizon), None
        for frame in past.unbind(1):
            frame, state = self._predict(frame, static, state)
        frames = [frame]
        while len(frames) < horizon:
            frame, state = self._predict(frame, static, state)
            frames.append(frame)
        return torch.stack(frames, 1)

    def _predictions(self, frames: Tensor, static: Tensor | None) -> Iterator[Tensor]:
        state = None
        for frame in frames.unbind(1):
            prediction, state = self._predict(frame, static, state)
            yield prediction

    def _predict(self, frame: Tensor, static: Tensor | None, state: State | None) -> tuple[Tensor, State]:
        """`step` on a frame as it is: (B, C, H, W) -> the next one, and the state."""
        seen = F.pixel_unshuffle(padded(with_static(frame, static), self.multiple), self.task.patch)
        prediction, state = self.step(seen, self.initial_state(seen) if state is None else state)
        return cropped(F.pixel_shuffle(prediction, self.task.patch), frame), state


class StackedBaseline(RecurrentBaseline[State]):
    """Layers of recurrent cells, all `hidden` wide, and a 1x1 convolution from the top one to the frame.

    Args:
        task: what is predicted.
        cell: makes a layer, of the channels of its input, `hidden` and `kernel`.
        hidden: channels of a layer's states.
        layers: number of layers.
        kernel: height and width of the cells' convolutions.
        bias: whether the convolution to the frame has one.

    Raises ValueError for counts below 1 and even kernels.
    """

    takes_patches = True

    def __init__(
        self, task: Task, cell: Callable[[int, int, int], nn.Module], hidden: int, layers: int, kernel: int, bias: bool
    ) -> None:
        super().__init__(task, multiple=task.patch)
        check_at_least_one("hidden", hidden)
        check_at_least_one("layers", layers)
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel has to be odd, not {kernel}")
        self.hidden = hidden
        pixels = task.patch**2
        widths = [task.input_channels * pixels, *[hidden] * (layers - 1)]
        self.cells = nn.ModuleList(cell(width, hidden, kernel) for width in widths)
        self.to_frame = nn.Conv2d(hidden, task.channels * pixels, 1, bias=bias)

    def zeros(self, frame: Tensor) -> Tensor:
        """One layer's initial state for `frame` (B, N, H, W): (B, hidden, H, W)."""
        return frame.new_zeros(frame.shape[0], self.hidden, *frame.shape[-2:])
