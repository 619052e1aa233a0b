"""Recurrent baselines, which process one frame per step and carry a state.

Shapes: as in crevnet.networks.video_model, with Ci the input channels, including static ones. The patch size is p, and the
frame is Hp x Wp, padded at the bottom and the right.
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
    """Predicts the next frame from the current one and a state, which is an argument and a result, never a module attribute.

    Subclasses implement `initial_state` and `step`. Their frames include the static channels and are padded to multiples of
    `multiple`. Each patch of `patch` x `patch` pixels is folded into the channels of one pixel: (B, Ci p p, Hp / p, Wp / p).
    """

    def __init__(self, config: Config, multiple: int, patch: int = 1) -> None:
        super().__init__(config)
        self.multiple = multiple
        self.patch = patch

    @abstractmethod
    def initial_state(self, frame: Tensor) -> State:
        """The state before the first step, shaped for `frame` (B, Ci p p, Hp / p, Wp / p), whose values are not used."""

    @abstractmethod
    def step(self, frame: Tensor, state: State) -> tuple[Tensor, State]:
        """Predict the data channels of the next frame, (B, C p p, Hp / p, Wp / p), and the next state.

        `frame` is (B, Ci p p, Hp / p, Wp / p).
        """

    def forward(self, frames: Tensor, static: Tensor | None = None) -> Tensor:
        """One-step predictions (B, T, C, H, W): entry t is the predicted frame t + 1, from the true frames up to t."""
        self._check(frames, static)
        return torch.stack(list(self._predictions(frames, static, [True] * frames.shape[1])), 1)

    def loss(
        self, frames: Tensor, static: Tensor | None = None, over: Loss = "all", fed: Sequence[bool] | None = None
    ) -> Tensor:
        """Mean squared error of the one-step predictions within a window of past and future frames (B, T, C, H, W)."""
        self._check(frames, static, at_least=2)
        chosen, truth = self._chosen(over, frames.shape[1] - 1), frames[:, 1:].unbind(1)
        # Accumulated per step: a stack of all predictions, and its gradient, would each take another frame per step.
        predictions = self._predictions(frames, static, self._truly_fed(frames.shape[1], fed)[: chosen.stop])
        errors = [mean_squared_error(p, truth[t]) for t, p in enumerate(predictions) if t in chosen]
        return torch.stack(errors).mean()

    @torch.no_grad()
    def generate(self, past: Tensor, static: Tensor | None = None, horizon: int | None = None) -> Tensor:
        """The frames after `past` (B, T, C, H, W), each predicted from the previous one: (B, horizon, C, H, W), not clipped."""
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
        """Predictions of the frame after each of `frames`. If its entry of `fed` is false, the input is the last prediction."""
        prediction, state = frames[:, 0], None
        for t, true in enumerate(fed):
            prediction, state = self._predict(frames[:, t] if true else prediction, static, state)
            yield prediction

    def _predict(self, frame: Tensor, static: Tensor | None, state: State | None) -> tuple[Tensor, State]:
        """`step` for a frame without padding or patches, (B, C, H, W): the next frame, (B, C, H, W), and the state."""
        seen = F.pixel_unshuffle(padded(with_static(frame, static), self.multiple), self.patch)
        prediction, state = self.step(seen, self.initial_state(seen) if state is None else state)
        return cropped(F.pixel_shuffle(prediction, self.patch), frame), state


@dataclass(frozen=True)
class StackedConfig(ModelConfig):
    """Configuration of a stack of recurrent layers with equal widths.

    Args:
        hidden: channels of a layer's states.
        layers: number of layers.
        kernel: odd height and width of the cells' convolutions, in pixels.
        patch: side, in pixels, of the patches that are folded into channels. The cells' states have H/patch x W/patch pixels.
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
            raise ValueError(f"kernel must be odd and at least 1, not {self.kernel}")


class StackedBaseline(RecurrentBaseline[StackedConfig, State]):
    """A stack of recurrent layers of width `hidden`, and a 1x1 convolution from the top layer to the frame.

    Args:
        config: the model's configuration.
        cell: creates a layer from its number of input channels, `hidden` and `kernel`.
        bias: whether the convolution to the frame has a bias.
    """

    def __init__(self, config: StackedConfig, cell: Callable[[int, int, int], nn.Module], bias: bool) -> None:
        super().__init__(config, multiple=config.patch, patch=config.patch)
        pixels = config.patch**2
        widths = [config.input_channels * pixels, *[config.hidden] * (config.layers - 1)]
        self.cells = nn.ModuleList(cell(width, config.hidden, config.kernel) for width in widths)
        self.to_frame = nn.Conv2d(config.hidden, config.channels * pixels, 1, bias=bias)

    def zeros(self, frame: Tensor) -> Tensor:
        """A layer's initial state, zeros (B, hidden, H, W), for `frame` (B, N, H, W)."""
        return frame.new_zeros(frame.shape[0], self.config.hidden, *frame.shape[-2:])
