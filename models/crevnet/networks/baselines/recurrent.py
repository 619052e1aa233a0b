"""Baselines that go from frame to frame with a state.

Shapes: as in crevnet.networks.video_model; Ci channels that a model sees, the static ones among them; p the patch, and Hp x Wp
the frame, padded at the bottom and the right.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crevnet.networks.config import Loss, ModelConfig, check_at_least_one
from crevnet.networks.shapes import cropped, mean_squared_error, padded, with_static
from crevnet.networks.video_model import Config, VideoModel

State = TypeVar("State")


class RecurrentBaseline(VideoModel[Config], Generic[Config, State]):
    """One step predicts the next frame from this one and a state; the state comes in and goes out, and is never kept on a module.

    A subclass gives `initial_state` and `step`. They see frames with the static channels, padded to multiples of `multiple` and
    folded into patches of `patch` x `patch` pixels, whose channels are one pixel's: (B, Ci p p, Hp / p, Wp / p).
    """

    def __init__(self, config: Config, multiple: int, patch: int = 1) -> None:
        super().__init__(config)
        self.multiple = multiple
        self.patch = patch

    @abstractmethod
    def initial_state(self, frame: Tensor) -> State:
        """The state before the first step, shaped for `frame` (B, Ci p p, Hp / p, Wp / p), of which no value is used."""

    @abstractmethod
    def step(self, frame: Tensor, state: State) -> tuple[Tensor, State]:
        """(B, Ci p p, Hp / p, Wp / p) -> the next frame's data channels, (B, C p p, Hp / p, Wp / p), and the next state."""

    def forward(self, frames: Tensor, static: Tensor | None = None) -> Tensor:
        """One-step predictions (B, T, C, H, W): entry t is the frame after frame t, from the true frames up to t."""
        self._check(frames, static)
        return torch.stack(list(self._predictions(frames, static, [True] * frames.shape[1])), 1)

    def loss(
        self, frames: Tensor, static: Tensor | None = None, over: Loss = "all", fed: Sequence[bool] | None = None
    ) -> Tensor:
        """Mean squared error of the one-step predictions within a window of past and future frames (B, T, C, H, W)."""
        self._check(frames, static, at_least=2)
        chosen, truth = self._chosen(over, frames.shape[1] - 1), frames[:, 1:].unbind(1)
        # Step by step: a stack of all predictions, and its gradient, would each take a frame a step more.
        predictions = self._predictions(frames, static, self._truly_fed(frames.shape[1], fed)[: chosen.stop])
        errors = [mean_squared_error(p, truth[t]) for t, p in enumerate(predictions) if t in chosen]
        return torch.stack(errors).mean()

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

    def _predictions(self, frames: Tensor, static: Tensor | None, fed: Sequence[bool]) -> Iterator[Tensor]:
        """The frame that follows each of `frames`, from the frame itself where it is `fed`, and else from its prediction."""
        prediction, state = frames[:, 0], None
        for t, true in enumerate(fed):
            prediction, state = self._predict(frames[:, t] if true else prediction, static, state)
            yield prediction

    def _predict(self, frame: Tensor, static: Tensor | None, state: State | None) -> tuple[Tensor, State]:
        """`step` on a frame as it is: (B, C, H, W) -> the next one, and the state."""
        seen = F.pixel_unshuffle(padded(with_static(frame, static), self.multiple), self.patch)
        prediction, state = self.step(seen, self.initial_state(seen) if state is None else state)
        return cropped(F.pixel_shuffle(prediction, self.patch), frame), state


@dataclass(frozen=True)
class StackedConfig(ModelConfig):
    """Layers of recurrent cells, all of one width.

    Args:
        hidden: channels of a layer's states.
        layers: number of layers.
        kernel: height and width of the cells' convolutions.
        patch: the model works on frames of H/patch x W/patch pixels, each the channels of patch x patch pixels.
    """

    hidden: int = 128
    layers: int = 4
    kernel: int = 5
    patch: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("hidden", "layers", "patch"):
            check_at_least_one(name, getattr(self, name))
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel has to be odd, not {self.kernel}")


class StackedBaseline(RecurrentBaseline[StackedConfig, State]):
    """Layers of recurrent cells, all `hidden` wide, and a 1x1 convolution from the top one to the frame.

    Args:
        config: what is predicted, and the sizes.
        cell: makes a layer, of the channels of its input, `hidden` and `kernel`.
        bias: whether the convolution to the frame has one.
    """

    def __init__(self, config: StackedConfig, cell: Callable[[int, int, int], nn.Module], bias: bool) -> None:
        super().__init__(config, multiple=config.patch, patch=config.patch)
        pixels = config.patch**2
        widths = [config.input_channels * pixels, *[config.hidden] * (config.layers - 1)]
        self.cells = nn.ModuleList(cell(width, config.hidden, config.kernel) for width in widths)
        self.to_frame = nn.Conv2d(config.hidden, config.channels * pixels, 1, bias=bias)

    def zeros(self, frame: Tensor) -> Tensor:
        """One layer's initial state for `frame` (B, N, H, W): (B, hidden, H, W)."""
        return frame.new_zeros(frame.shape[0], self.config.hidden, *frame.shape[-2:])
