"""CrevNet: Conditionally Reversible Video Prediction (Yu et al. 2019, https://arxiv.org/abs/1910.11577).

Shapes: B batch, T frames, C data channels, H x W height and width of a frame. Values are in [0, 1]. The network's own frames
are Ci x Hp x Wp: static channels follow the data channels, and the bottom and the right are padded to multiples of the
downsampling. A time step processes a clip of K frames (`CrevNetConfig.clip`). If K is 1, `step` and `recover` have no such
dimension. Each clip begins one frame after the previous one, so only its last frame is new.
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
from crevnet.networks.video_model import Model, VideoModel


class CrevNet(VideoModel[CrevNetConfig]):
    """Predicts the next frames of a video, at any frame size.

    `forward` returns the one-step predictions on which it is trained, `generate` the frames after the past ones, and `loss` the
    training loss. Training stores only the latent, the predicted frame and the predictor's states of each time step. revflow
    recomputes everything within a frame and between modules.

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
        """One-step predictions: entry t is the predicted frame t + K, from the true frames before it.

        Args:
            frames: (B, T, C, H, W), floating point.
            static: (B, S, H, W), if the configuration has static channels.

        Returns (B, T - K + 1, C, H, W).
        """
        self._check(frames, static, at_least=self.config.clip)
        latents = self._latents(frames, static, [True] * frames.shape[1])
        return torch.stack([self._crop(self._decode(latent), frames)[:, -1] for latent in latents], 1)

    def loss(
        self, frames: Tensor, static: Tensor | None = None, over: Loss = "all", fed: Sequence[bool] | None = None
    ) -> Tensor:
        """Mean squared error of the one-step predictions within a window of past and future frames (B, T, C, H, W).

        As in the authors' code, it covers the whole clip that ends with each predicted frame.

        Args:
            frames: the window.
            static: (B, S, H, W), if the configuration has static channels.
            over: the predictions that the loss covers. With "all", "future" (only the last `horizon` frames), or the number of
                one future frame, it covers the data channels inside the frame. With "padded" it covers all predictions with
                padding and static channels, as in the authors' code (which sums over the steps).
            fed: for each future frame but the last, whether the true frame is encoded; if false, the predicted latent is the
                input instead, as in `generate`. All entries are true by default.
        """
        clip = self.config.clip
        self._check(frames, static, at_least=clip + 1)
        chosen = self._chosen(over, frames.shape[1] - clip)
        true = self._truly_fed(frames.shape[1], fed)[clip - 1 :]  # by the last frame of each clip
        # Accumulated per step: a stack of all predictions, its gradient and a padded window would each take a frame per step.
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

        Args:
            past: the input frames.
            static: (B, S, H, W), if the configuration has static channels.
            horizon: number of frames; the configuration's by default.
            feedback: the input of the next step. With "latent" it is the predicted latent, without encoding (the paper's section
                2.1). With "frame" the prediction is decoded, its static channels, padding and past frames of its clip are
                restored, and it is encoded (the authors' code).
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
        """Frames (B, T, C, H, W) with static channels added and padded with zeros: (B, T, Ci, Hp, Wp)."""
        self._check(frames, static)
        return self._pad(frames, static)

    def step(self, frame: Tensor, state: PredictorState | None = None) -> tuple[Tensor, PredictorState]:
        """One time step: predict the next frame (B, Ci, Hp, Wp), or the next clip (B, K, Ci, Hp, Wp), and the next state.

        `frame` has the same shape. In exact arithmetic, the state contains the residuals that `recover` requires.
        """
        latent = self.autoencoder.encode(frame)
        state = self.predictor.initial_state(latent) if state is None else state
        latent, state = self.predictor(latent, state, keep_residuals=self.config.grid is not None)
        return self.autoencoder.decode(latent), state

    def recover(self, prediction: Tensor, before: PredictorState, after: PredictorState) -> Tensor:
        """Eq. 5: the input frame of `step` from its predicted frame, (B, Ci, Hp, Wp), or the clip.

        `Predictor.inverse` states the error. In exact arithmetic there is no error: the result is the input frame, rounded to the
        grid.

        Args:
            prediction: the frame that the step predicted.
            before: the state before the step.
            after: the state that the step returned; only its memories and residuals are used.
        """
        return self.autoencoder.decode(self.predictor.inverse(self.autoencoder.encode(prediction), before, after))

    @torch.no_grad()
    def rebuilt(self, frames: Tensor) -> Iterator[Tensor]:
        """Each of `frames` (B, T, Ci, Hp, Wp) but the first K, as `recover` computes it from the prediction of `step`."""
        state = None
        for clip in self._clips(frames):
            prediction, after = self.step(clip.squeeze(1), state)
            if state is not None:
                yield self._as_clip(self.recover(prediction, state, after))[:, -1]
            state = after

    def compile_parts(self, **options: Any) -> None:
        """Compile the autoencoder's conditioners and the two parts of each predictive module, which the engine calls directly."""
        self.autoencoder.blocks.compile_conditioners(**options)
        self.predictor.stack.compile_cells(**options)

    def _latents(self, frames: Tensor, static: Tensor | None, fed: Sequence[bool]) -> Iterator[Latent]:
        """The predicted latent of the clip after each clip in `frames` (B, T, C, H, W).

        If a clip's entry of `fed` is false, its predicted latent is the input instead of the clip.
        """
        state = None
        for clip, true in zip(self._clips(frames), fed, strict=False):
            if true:
                latent = self._encode(clip, static)
            state = self.predictor.initial_state(latent) if state is None else state
            latent, state = self.predictor(latent, state)
            yield latent

    def _clips(self, frames: Tensor) -> Iterator[Tensor]:
        """The T - K + 1 clips (B, K, ...) of `frames` (B, T, ...), one per time step."""
        clip = self.config.clip
        return (frames[:, t : t + clip] for t in range(frames.shape[1] - clip + 1))

    def _encode(self, clip: Tensor, static: Tensor | None) -> Latent:
        """The latent of a clip (B, K, C, H, W)."""
        return self.autoencoder.encode(self._pad(clip, static).squeeze(1))

    def _decode(self, latent: Latent) -> Tensor:
        """The clip (B, K, Ci, Hp, Wp) of a latent."""
        return self._as_clip(self.autoencoder.decode(latent))

    def _as_clip(self, frames: Tensor) -> Tensor:
        """A clip (B, K, Ci, Hp, Wp), from itself or from a single frame (B, Ci, Hp, Wp)."""
        return frames.reshape(len(frames), self.config.clip, *frames.shape[-3:])

    def _pad(self, frames: Tensor, static: Tensor | None) -> Tensor:
        """Frames (B, T, C, H, W) with the static channels (B, S, H, W), padded: (B, T, Ci, Hp, Wp)."""
        known = None if static is None else static[:, None].expand(-1, frames.shape[1], -1, -1, -1)
        return padded(with_static(frames, known), self.config.downsampling)

    def _crop(self, frames: Tensor, like: Tensor) -> Tensor:
        """The data channels inside the frame, (..., C, H, W), of network frames (..., Ci, Hp, Wp)."""
        return cropped(frames[..., : self.config.channels, :, :], like)


MODEL = Model(CrevNetConfig, CrevNet)
