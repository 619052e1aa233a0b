"""CrevNet: Conditionally Reversible Video Prediction (Yu et al. 2019, https://arxiv.org/abs/1910.11577).

Shapes: B batch, T frames, C data channels, H x W height and width of a frame. Values are in [0, 1]. The network's own frames
are Ci x Hp x Wp: static channels follow the data channels, and the bottom and the right are padded to multiples of the
downsampling. A time step processes a clip of K frames (`CrevNetConfig.clip`). If K is 1, `step` and `recover` have no such
dimension. Each clip begins one frame after the previous one, so only its last frame is new.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

import revflow
from crevnet.networks.config import CrevNetConfig, Feedback, Loss
from crevnet.networks.convolution import channels_last
from crevnet.networks.crevnet.autoencoder import Latent, TwoWayAutoencoder
from crevnet.networks.crevnet.free_share import amount, budget_of, is_amount
from crevnet.networks.crevnet.predictor import Predictor, PredictorState
from crevnet.networks.shapes import cropped, mean_squared_error, padded, with_static
from crevnet.networks.video_model import Model, VideoModel


class CrevNet(VideoModel[CrevNetConfig]):
    """The CrevNet network, which predicts the next frames of a video. Frames may have any size.

    `forward` returns the one-step predictions from which the training loss is computed. `loss` returns the training loss, and
    `generate` returns the frames that follow the past frames.

    The autoencoder and the predictor share a memory budget, `budget`. During training, the latent, the predicted frame and the
    predictor's states are stored for each time step. So are other activations as far as they fit in the budget. The backward pass
    recomputes the rest. For `memory_budget="auto"` and for shares, the amount is determined before the first training call.

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
        determined = is_amount(config.memory_budget)
        self.use_budget(revflow.Budget(config.memory_budget if determined else "min"))
        self._is_determined = determined
        self._to_compile: dict[str, Any] | None = None
        """The options for `torch.compile`, until the budget's plan is known."""

    def use_budget(self, budget: revflow.Budget) -> None:
        """Limit the activations of the autoencoder and the predictor together by `budget`, instead of the configuration's."""
        self.budget = self.autoencoder.blocks.memory_budget = self.predictor.stack.memory_budget = budget
        self._is_determined = True

    def forward(self, frames: Tensor, static: Tensor | None = None) -> Tensor:
        """Return the one-step predictions. Entry t is the prediction of frame t + K, computed from the true frames before it.

        Args:
            frames: floating-point input frames (B, T, C, H, W).
            static: static channels (B, S, H, W), if the configuration includes any.

        Returns:
            the predicted frames (B, T - K + 1, C, H, W).
        """
        self._check(frames, static, at_least=self.config.clip)
        latents = self._latents(frames, static, [True] * frames.shape[1])
        return torch.stack([self._crop(self._decode(latent), frames)[:, -1] for latent in latents], 1)

    def loss(
        self, frames: Tensor, static: Tensor | None = None, over: Loss = "all", fed: Sequence[bool] | None = None
    ) -> Tensor:
        """Return the mean squared error of the one-step predictions for windows of past and future frames.

        For each prediction, the error is computed over the whole clip that ends with the predicted frame. (The authors'
        code does the same.)

        Args:
            frames: windows of frames (B, T, C, H, W).
            static: static channels (B, S, H, W), if the configuration includes any.
            over: predictions over which the loss is computed: "all", "future" (only the last `horizon` frames), or the number of
                a single future frame, counted from 1. For these values, padding and static channels are excluded. If "padded" is
                given, the loss covers all predictions and also padding and static channels, as in the authors' code. (That code
                sums over the time steps instead of averaging.)
            fed: for each future frame except the last, whether the true frame is encoded as the input to the next time step. If
                an entry is false, the predicted latent is used instead, as in `generate`. By default, all entries are true.
        """
        return self._mean_error(frames, static, over, fed)

    def plan(
        self, frames: Tensor, static: Tensor | None = None, over: Loss = "all", fed: Sequence[bool] | None = None
    ) -> revflow.StepPlan | None:
        """Plan the memory of training steps with such a `loss`, and return the plan, so that the first step follows it.

        The forward pass of one training step measures the memory of all activations. The values of `frames` and `static` do not
        matter. The result is None for the budgets "min" and "max", which need no plan. For the arguments, see `loss`.
        """
        with torch.enable_grad():
            self._mean_error(frames, static, over, fed)
        return self.budget.plan

    @torch.no_grad()
    def generate(
        self, past: Tensor, static: Tensor | None = None, horizon: int | None = None, feedback: Feedback = "latent"
    ) -> Tensor:
        """Predict the frames that follow `past` and return them as a tensor (B, horizon, C, H, W). The values are not clipped.

        Args:
            past: input frames (B, T, C, H, W).
            static: static channels (B, S, H, W), if the configuration includes any.
            horizon: number of frames to predict; by default, `config.horizon`.
            feedback: input to the next time step. If it is "latent", the predicted latent is used directly (section 2.1 of the
                paper). If it is "frame", the prediction is decoded and then encoded again, as in the authors' code. Before
                encoding, the static channels, the padding and the past frames of the clip are restored.
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
        """Append the static channels to `frames` (B, T, C, H, W), pad with zeros, and return the result (B, T, Ci, Hp, Wp)."""
        self._check(frames, static)
        return self._pad(frames, static)

    def step(self, frame: Tensor, state: PredictorState | None = None) -> tuple[Tensor, PredictorState]:
        """Run one time step and return the predicted frame (or clip) and the new state.

        The input `frame` and the prediction have the same shape: (B, Ci, Hp, Wp), or (B, K, Ci, Hp, Wp) if K is greater than 1.
        In exact arithmetic, the new state also contains the residuals that `recover` requires.
        """
        self._determine_budget()
        latent = self.autoencoder.encode(frame)
        state = self.predictor.initial_state(latent) if state is None else state
        latent, state = self.predictor(latent, state, keep_residuals=self.config.grid is not None)
        return self.autoencoder.decode(latent), state

    def recover(self, prediction: Tensor, before: PredictorState, after: PredictorState) -> Tensor:
        """From a prediction, recover the frame (or clip) that was passed to `step`, using eq. 5 of the paper.

        In exact arithmetic, the result is bit-identical to the input frame after rounding to the grid. Otherwise, the result
        contains a rounding error. For the size of this error, see `Predictor.inverse`.

        Args:
            prediction: the frame or clip predicted by `step`.
            before: the state before the time step.
            after: the state returned by `step`. Only its memories and residuals are used.
        """
        return self.autoencoder.decode(self.predictor.inverse(self.autoencoder.encode(prediction), before, after))

    @torch.no_grad()
    def rebuilt(self, frames: Tensor) -> Iterator[Tensor]:
        """Recover each frame of `frames` (B, T, Ci, Hp, Wp) except the first K, and yield the recovered frames.

        `step` computes a prediction from each frame, and `recover` then computes the frame from this prediction.
        """
        state = None
        for clip in self._clips(frames):
            prediction, after = self.step(clip.squeeze(1), state)
            if state is not None:
                yield self._as_clip(self.recover(prediction, state, after))[:, -1]
            state = after

    def compile_parts(self, **options: Any) -> None:
        """Compile time steps in place with `torch.compile(..., **options)`.

        The encoder, the predictor and the decoder are one graph each. Their backward passes recompute the activations, or all
        activations are stored. For a memory budget other than "min" and "max", the first training step runs uncompiled, and
        measures whether all of them fit in the budget. The state dict keys do not change.
        """
        self._to_compile = options
        self._compile_if_planned()

    def _compile_if_planned(self) -> None:
        """Compile as `compile_parts` was called to do, if it is known whether activations are stored."""
        if self._to_compile is None or not self._is_determined:
            return
        if self.budget.memory not in ("min", "max"):
            plan = self.budget.plan
            if plan is None:
                return
            is_stored = all(call.stored == call.units for call in plan.calls)
            self.use_budget(revflow.Budget("max" if is_stored else "min"))
        parts: list[tuple[nn.Module, str]] = [
            (self.autoencoder, "encode"),
            (self.autoencoder, "decode"),
            (self.predictor, "forward"),
        ]
        for module, name in parts:
            method = torch.compile(getattr(type(module), name), **self._to_compile)
            setattr(module, name, MethodType(method, module))  # a copy of the network gets methods of its own
        self._to_compile = None

    def _mean_error(self, frames: Tensor, static: Tensor | None, over: Loss, fed: Sequence[bool] | None) -> Tensor:
        """The mean squared error over the chosen predictions, as a graph."""
        clip = self.config.clip
        self._check(frames, static, at_least=clip + 1)
        self._compile_if_planned()
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

    def _determine_budget(self) -> None:
        """Before the first training call, replace a share of the free memory by its bytes."""
        if not self._is_determined and torch.is_grad_enabled():
            self.use_budget(budget_of(self.config.memory_budget, amount(self.config.memory_budget, self.parameters())))

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
        self._determine_budget()
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
