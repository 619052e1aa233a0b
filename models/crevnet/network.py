"""CrevNet: Conditionally Reversible Video Prediction (Yu et al. 2019, https://arxiv.org/abs/1910.11577).

Shapes: B batch, T frames, C data channels, H x W a frame's height and width; Ci, Hp, Wp as the network sees them: with
the static channels behind the others, and padded at the bottom and the right to multiples of the downsampling. Values in [0, 1].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from crevnet.autoencoder import Latent, TwoWayAutoencoder
from crevnet.config import CrevNetConfig, Loss
from crevnet.predictor import Predictor, PredictorState
from crevnet.shapes import cropped, mean_squared_error, padded, with_static
from crevnet.video_model import VideoModel

Feedback = Literal["latent", "frame"]


class CrevNet(VideoModel[CrevNetConfig]):
    """Predicts the next frames of a video, at any frame size.

    `forward` gives the one-step predictions that it is trained on, `generate` the frames after the past ones, `loss` the
    training loss. In training nothing is stored of a time step but its latent, its predicted frame and the predictor's
    states (revflow): not within a frame, and not from module to module.
    """

    def __init__(self, config: CrevNetConfig) -> None:
        super().__init__(config)
        self.autoencoder = TwoWayAutoencoder(config)
        self.predictor = Predictor(config)

    def forward(self, frames: Tensor, static: Tensor | None = None) -> Tensor:
        """One-step predictions: entry t is the frame after frame t, from the true frames up to t.

        Args:
            frames: (B, T, C, H, W), float.
            static: (B, S, H, W), where the configuration has static channels.

        Returns (B, T, C, H, W).
        """
        self._check(frames, static)
        latents = self._latents(frames, static, [True] * frames.shape[1])
        return torch.stack([self._crop(self.autoencoder.decode(latent), frames) for latent in latents], 1)

    def loss(
        self, frames: Tensor, static: Tensor | None = None, over: Loss = "all", fed: Sequence[bool] | None = None
    ) -> Tensor:
        """Mean squared error of the one-step predictions within a window of past and future frames (B, T, C, H, W).

        over: "all" predictions, data channels inside the frame alone; "future": those of the last `horizon` frames alone;
            "padded": all of them with the padding and the static channels, as in the authors' code (which sums over the steps);
            or one of the future frames, by its number.
        fed: which of the future frames are encoded, one entry for each but the last; where it is false, the predicted latent is
            fed instead, as `generate` does. All are encoded if not given.
        """
        self._check(frames, static, at_least=2)
        chosen = self._chosen(over, frames.shape[1] - 1)
        # Step by step: a stack of all predictions, its gradient and a padded window would each take a frame a step more.
        errors = []
        for t, latent in enumerate(self._latents(frames, static, self._truly_fed(frames.shape[1], fed)[: chosen.stop])):
            if t in chosen:
                prediction, truth = self.autoencoder.decode(latent), frames[:, t + 1]
                if over == "padded":
                    truth = self._pad(truth, static)
                else:
                    prediction = self._crop(prediction, frames)
                errors.append(mean_squared_error(prediction, truth))
        return torch.stack(errors).mean()

    @torch.no_grad()
    def generate(
        self, past: Tensor, static: Tensor | None = None, horizon: int | None = None, feedback: Feedback = "latent"
    ) -> Tensor:
        """The frames after `past` (B, T, C, H, W): (B, horizon, C, H, W), not clipped.

        feedback: "latent" feeds the predicted latent to the next step, never encoding again (the paper's section 2.1);
            "frame" decodes the prediction, puts the static channels and the padding back, and encodes it (the authors' code).
        """
        self._check(past, static)
        horizon, state = self._horizon(horizon), None
        for frame in past.unbind(1):
            latent: Latent = self.autoencoder.encode(self._pad(frame, static))
            state = self.predictor.initial_state(latent) if state is None else state
            latent, state = self.predictor(latent, state)
        frames = [self._crop(self.autoencoder.decode(latent), past)]
        while len(frames) < horizon:
            if feedback == "frame":
                latent = self.autoencoder.encode(self._pad(frames[-1], static))
            latent, state = self.predictor(latent, state)
            frames.append(self._crop(self.autoencoder.decode(latent), past))
        return torch.stack(frames, 1)

    def padded(self, frames: Tensor, static: Tensor | None) -> Tensor:
        """Frames as the network sees them, (B, T, C, H, W) -> (B, T, Ci, Hp, Wp): static channels added, padded with zeros."""
        self._check(frames, static)
        return self._pad(frames, None if static is None else static[:, None].expand(-1, frames.shape[1], -1, -1, -1))

    def step(self, frame: Tensor, state: PredictorState | None = None) -> tuple[Tensor, PredictorState]:
        """One time step on whole frames: (B, Ci, Hp, Wp) -> the predicted next one, of the same shape, and the state.

        In exact arithmetic the state holds the residuals that `recover` needs.
        """
        latent = self.autoencoder.encode(frame)
        state = self.predictor.initial_state(latent) if state is None else state
        latent, state = self.predictor(latent, state, keep_residuals=self.config.grid is not None)
        return self.autoencoder.decode(latent), state

    def recover(self, prediction: Tensor, before: PredictorState, after: PredictorState) -> Tensor:
        """Eq. 5: the frame that `step` was given, from the frame that it predicted, (B, Ci, Hp, Wp).

        before: the state that the step was given. after: the state that it returned, of which the memories and the
            residuals are used. `Predictor.inverse` states the error; in exact arithmetic there is none, and the frame is the
            one that the step was given, rounded to the grid.
        """
        return self.autoencoder.decode(self.predictor.inverse(self.autoencoder.encode(prediction), before, after))

    @torch.no_grad()
    def rebuilt(self, frames: Tensor) -> Iterator[Tensor]:
        """Each of `frames` (B, T, Ci, Hp, Wp) but the first, as `recover` makes it of what `step` predicted from it."""
        state = None
        for frame in frames.unbind(1):
            prediction, after = self.step(frame, state)
            if state is not None:
                yield self.recover(prediction, state, after)
            state = after

    def compile_parts(self, **options: Any) -> None:
        """The autoencoder's conditioners, and the two parts of a predictive module, as the engine runs them by themselves."""
        self.autoencoder.blocks.compile_conditioners(**options)
        self.predictor.stack.compile_cells(**options)

    def _latents(self, frames: Tensor, static: Tensor | None, fed: Sequence[bool]) -> Iterator[Latent]:
        """The predicted latents of the frames that follow each of `frames` (B, T, C, H, W), from the frame itself where it is
        `fed`, and else from its own predicted latent."""
        state = None
        for t, true in enumerate(fed):
            if true:
                latent: Latent = self.autoencoder.encode(self._pad(frames[:, t], static))
            state = self.predictor.initial_state(latent) if state is None else state
            latent, state = self.predictor(latent, state)
            yield latent

    def _pad(self, frames: Tensor, static: Tensor | None) -> Tensor:
        """(..., C, H, W), (..., S, H, W) -> (..., Ci, Hp, Wp)."""
        return padded(with_static(frames, static), self.config.downsampling)

    def _crop(self, frames: Tensor, like: Tensor) -> Tensor:
        """(..., Ci, Hp, Wp) -> (..., C, H, W), the data channels inside the frame."""
        return cropped(frames[..., : self.config.channels, :, :], like)
