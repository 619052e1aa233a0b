"""CrevNet: Conditionally Reversible Video Prediction (Yu et al. 2019, https://arxiv.org/abs/1910.11577).

Shapes: B batch, T frames, C data channels, H x W a frame's height and width; Ci, Hp, Wp as the network sees them: with
the static channels behind the others, and padded at the bottom and the right to multiples of the downsampling. Values in [0, 1].
K frames of a clip, what the network sees in one time step: 1, and then it has no dimension in `step` and `recover`, or
several (`CrevNetConfig.clip`). A clip begins a frame after the one before, so that its last frame is what is new in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from crevnet.networks.config import CrevNetConfig, Feedback, Loss
from crevnet.networks.convolution import channels_last
from crevnet.networks.crevnet.autoencoder import Latent, TwoWayAutoencoder
from crevnet.networks.crevnet.predictor import Predictor, PredictorState
from crevnet.networks.shapes import cropped, mean_squared_error, padded, with_static
from crevnet.networks.video_model import VideoModel


class CrevNet(VideoModel[CrevNetConfig]):
    """Predicts the next frames of a video, at any frame size.

    `forward` gives the one-step predictions that it is trained on, `generate` the frames after the past ones, `loss` the
    training loss. In training nothing is stored of a time step but its latent, its predicted frame and the predictor's
    states (revflow): not within a frame, and not from module to module.

    Examples:
        >>> config = crevnet.CrevNetConfig(channels=1, static=(), blocks=(1,), strides=(2,), modules=2)
        >>> net = crevnet.CrevNet(config)
        >>> video = torch.rand(1, 12, 1, 16, 16)  # (batch, frames, channels, height, width)
        >>> net.loss(video).backward()
        >>> net.generate(video[:, :9]).shape  # the three frames after nine
        torch.Size([1, 3, 1, 16, 16])
    """

    def __init__(self, config: CrevNetConfig) -> None:
        super().__init__(config)
        self.channels_last = channels_last(config.clip)
        self.autoencoder = TwoWayAutoencoder(config)
        self.predictor = Predictor(config)

    def forward(self, frames: Tensor, static: Tensor | None = None) -> Tensor:
        """One-step predictions: entry t is the frame after frame t + K - 1, from the true frames up to that one.

        Args:
            frames: (B, T, C, H, W), float.
            static: (B, S, H, W), where the configuration has static channels.

        Returns (B, T - K + 1, C, H, W).
        """
        self._check(frames, static, at_least=self.config.clip)
        latents = self._latents(frames, static, [True] * frames.shape[1])
        return torch.stack([self._crop(self._decode(latent), frames)[:, -1] for latent in latents], 1)

    def loss(
        self, frames: Tensor, static: Tensor | None = None, over: Loss = "all", fed: Sequence[bool] | None = None
    ) -> Tensor:
        """Mean squared error of the one-step predictions within a window of past and future frames (B, T, C, H, W): that of
        the whole clips whose last frame is predicted, as in the authors' code.

        over: "all" predictions, data channels inside the frame alone; "future": those of the last `horizon` frames alone;
            "padded": all of them with the padding and the static channels, as in the authors' code (which sums over the steps);
            or one of the future frames, by its number.
        fed: which of the future frames are encoded, one entry for each but the last; where it is false, the predicted latent is
            fed instead, as `generate` does. All are encoded if not given.
        """
        clip = self.config.clip
        self._check(frames, static, at_least=clip + 1)
        chosen = self._chosen(over, frames.shape[1] - clip)
        true = self._truly_fed(frames.shape[1], fed)[clip - 1 :]  # by the last frame of each clip
        # Step by step: a stack of all predictions, its gradient and a padded window would each take a frame a step more.
        errors = []
        for t, latent in enumerate(self._latents(frames, static, true[: chosen.stop])):
            if t in chosen:
                prediction, truth = self._decode(latent), frames[:, t + 1 : t + 1 + clip]
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
            "frame" decodes the prediction, puts the static channels, the padding and those frames of its clip that are past
            ones back, and encodes it (the authors' code).
        """
        self._check(past, static, at_least=self.config.clip)
        horizon, state = self._horizon(horizon), None
        for seen in self._clips(past):
            latent = self._encode(seen, static)
            state = self.predictor.initial_state(latent) if state is None else state
            latent, state = self.predictor(latent, state)
        clip = self._crop(self._decode(latent), past)
        frames = [clip[:, -1]]
        while len(frames) < horizon:
            if feedback == "frame":
                known = max(self.config.clip - len(frames), 0)
                latent = self._encode(torch.cat((past[:, past.shape[1] - known :], clip[:, known:]), 1), static)
            latent, state = self.predictor(latent, state)
            clip = self._crop(self._decode(latent), past)
            frames.append(clip[:, -1])
        return torch.stack(frames, 1)

    def padded(self, frames: Tensor, static: Tensor | None) -> Tensor:
        """Frames as the network sees them, (B, T, C, H, W) -> (B, T, Ci, Hp, Wp): static channels added, padded with zeros."""
        self._check(frames, static)
        return self._pad(frames, static)

    def step(self, frame: Tensor, state: PredictorState | None = None) -> tuple[Tensor, PredictorState]:
        """One time step on whole frames: (B, Ci, Hp, Wp), or a clip (B, K, Ci, Hp, Wp), -> the predicted next one, of the same
        shape, and the state.

        In exact arithmetic the state holds the residuals that `recover` needs.
        """
        latent = self.autoencoder.encode(frame)
        state = self.predictor.initial_state(latent) if state is None else state
        latent, state = self.predictor(latent, state, keep_residuals=self.config.grid is not None)
        return self.autoencoder.decode(latent), state

    def recover(self, prediction: Tensor, before: PredictorState, after: PredictorState) -> Tensor:
        """Eq. 5: the frame that `step` was given, from the frame that it predicted, (B, Ci, Hp, Wp), or the clip.

        before: the state that the step was given. after: the state that it returned, of which the memories and the
            residuals are used. `Predictor.inverse` states the error; in exact arithmetic there is none, and the frame is the
            one that the step was given, rounded to the grid.
        """
        return self.autoencoder.decode(self.predictor.inverse(self.autoencoder.encode(prediction), before, after))

    @torch.no_grad()
    def rebuilt(self, frames: Tensor) -> Iterator[Tensor]:
        """Each of `frames` (B, T, Ci, Hp, Wp) but the first K, as `recover` makes it of what `step` predicted from it."""
        state = None
        for clip in self._clips(frames):
            prediction, after = self.step(clip.squeeze(1), state)
            if state is not None:
                yield self._as_clip(self.recover(prediction, state, after))[:, -1]
            state = after

    def compile_parts(self, **options: Any) -> None:
        """The autoencoder's conditioners, and the two parts of a predictive module, as the engine runs them by themselves."""
        self.autoencoder.blocks.compile_conditioners(**options)
        self.predictor.stack.compile_cells(**options)

    def _latents(self, frames: Tensor, static: Tensor | None, fed: Sequence[bool]) -> Iterator[Latent]:
        """The predicted latents of the clips that follow each of those in `frames` (B, T, C, H, W), from the clip itself where it
        is `fed`, and else from its own predicted latent."""
        state = None
        for clip, true in zip(self._clips(frames), fed, strict=False):
            if true:
                latent = self._encode(clip, static)
            state = self.predictor.initial_state(latent) if state is None else state
            latent, state = self.predictor(latent, state)
            yield latent

    def _clips(self, frames: Tensor) -> Iterator[Tensor]:
        """What is seen step by step: (B, T, ...) -> T - K + 1 times (B, K, ...)."""
        clip = self.config.clip
        return (frames[:, t : t + clip] for t in range(frames.shape[1] - clip + 1))

    def _encode(self, clip: Tensor, static: Tensor | None) -> Latent:
        """(B, K, C, H, W) -> its latent."""
        return self.autoencoder.encode(self._pad(clip, static).squeeze(1))

    def _decode(self, latent: Latent) -> Tensor:
        """The clip (B, K, Ci, Hp, Wp) of a latent."""
        return self._as_clip(self.autoencoder.decode(latent))

    def _as_clip(self, frames: Tensor) -> Tensor:
        """(B, Ci, Hp, Wp) of a single frame, or (B, K, Ci, Hp, Wp), -> (B, K, Ci, Hp, Wp)."""
        return frames.reshape(len(frames), self.config.clip, *frames.shape[-3:])

    def _pad(self, frames: Tensor, static: Tensor | None) -> Tensor:
        """(B, T, C, H, W), (B, S, H, W) -> (B, T, Ci, Hp, Wp)."""
        known = None if static is None else static[:, None].expand(-1, frames.shape[1], -1, -1, -1)
        return padded(with_static(frames, known), self.config.downsampling)

    def _crop(self, frames: Tensor, like: Tensor) -> Tensor:
        """(..., Ci, Hp, Wp) -> (..., C, H, W), the data channels inside the frame."""
        return cropped(frames[..., : self.config.channels, :, :], like)
