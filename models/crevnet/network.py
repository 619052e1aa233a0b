"""CrevNet: Conditionally Reversible Video Prediction (Yu et al. 2019, https://arxiv.org/abs/1910.11577).

Shapes: B batch, T frames, C data channels, H x W a frame's height and width; Ci, Hp, Wp as the network sees them: with
the static channels behind the others, and padded at the bottom and the right to multiples of the downsampling. Values in [0, 1].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crevnet.autoencoder import Latent, TwoWayAutoencoder
from crevnet.config import CrevNetConfig
from crevnet.predictor import Predictor, PredictorState
from crevnet.shapes import check_window

Feedback = Literal["latent", "frame"]
Loss = Literal["all", "future", "padded", "generated"]


class CrevNet(nn.Module):
    """Predicts the next frames of a video, at any frame size.

    `forward` gives the one-step predictions that it is trained on, `generate` the frames after the past ones, `loss` the
    training loss. In training nothing is stored of a time step but its latent, its predicted frame and the predictor's
    states (revflow): not within a frame, and not from module to module.
    """

    def __init__(self, config: CrevNetConfig) -> None:
        super().__init__()
        self.config = config
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
        latents = self._latents(frames, static, frames.shape[1])
        return torch.stack([self._crop(self.autoencoder.decode(latent), frames) for latent in latents], 1)

    def loss(self, frames: Tensor, static: Tensor | None = None, over: Loss = "all") -> Tensor:
        """Mean squared error of the one-step predictions within a window of past and future frames (B, T, C, H, W).

        over: "all" predictions, data channels inside the frame alone; "future": those of the last `horizon` frames alone;
            "padded": all of them with the padding and the static channels, as in the authors' code (which sums over the steps);
            "generated": as "all", with the frames after the first future one generated as `generate` does, in latent space.
        """
        self._check(frames, static)
        count = frames.shape[1] - 1
        seen = frames[:, : self.config.past] if over == "generated" else frames[:, :-1]
        first = count - self.config.horizon if over == "future" else 0
        # Step by step: a stack of all predictions, its gradient and a padded window would each take a frame a step more.
        errors = []
        for t, latent in enumerate(self._latents(seen, static, count)):
            if t >= first:
                prediction, truth = self.autoencoder.decode(latent), frames[:, t + 1]
                if over == "padded":
                    truth = self._pad(truth, static)
                else:
                    prediction = self._crop(prediction, frames)
                errors.append(_mean_squared_error(prediction, truth))
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
        state = None
        for frame in past.unbind(1):
            latent: Latent = self.autoencoder.encode(self._pad(frame, static))
            state = self.predictor.initial_state(latent) if state is None else state
            latent, state = self.predictor(latent, state)
        frames = [self._crop(self.autoencoder.decode(latent), past)]
        while len(frames) < (self.config.horizon if horizon is None else horizon):
            if feedback == "frame":
                latent = self.autoencoder.encode(self._pad(frames[-1], static))
            latent, state = self.predictor(latent, state)
            frames.append(self._crop(self.autoencoder.decode(latent), past))
        return torch.stack(frames, 1)

    def padded(self, frames: Tensor, static: Tensor | None) -> Tensor:
        """Frames as the network sees them, (B, T, C, H, W) -> (B, T, Ci, Hp, Wp): static channels added, padded with zeros."""
        self._check(frames, static)
        return self._pad(frames, None if static is None else static[:, None].expand(-1, frames.shape[1], -1, -1, -1))

    def _check(self, frames: Tensor, static: Tensor | None) -> None:
        check_window(frames, static, self.config.channels, self.config.static_channels)

    def _pad(self, frames: Tensor, static: Tensor | None) -> Tensor:
        """(..., C, H, W), (..., S, H, W) -> (..., Ci, Hp, Wp)."""
        if static is not None:
            frames = torch.cat((frames, static), -3)
        height, width = frames.shape[-2:]
        d = self.config.downsampling
        return F.pad(frames, (0, -width % d, 0, -height % d))

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

    def _latents(self, frames: Tensor, static: Tensor | None, steps: int) -> Iterator[Latent]:
        """The latents of the frames that follow each of `frames` (B, T, C, H, W), and, from the predicted latents, of those
        that follow the last of them."""
        state = None
        for t in range(steps):
            if t < frames.shape[1]:
                latent: Latent = self.autoencoder.encode(self._pad(frames[:, t], static))
            state = self.predictor.initial_state(latent) if state is None else state
            latent, state = self.predictor(latent, state)
            yield latent

    def _crop(self, frames: Tensor, like: Tensor) -> Tensor:
        """(..., Ci, Hp, Wp) -> (..., C, H, W), the data channels inside the frame."""
        return frames[..., : self.config.channels, : like.shape[-2], : like.shape[-1]]


def _mean_squared_error(predictions: Tensor, truth: Tensor) -> Tensor:
    # PyTorch's result is a scalar in a buffer that is as large as the predictions; a copy is not.
    return F.mse_loss(predictions, truth).clone()
