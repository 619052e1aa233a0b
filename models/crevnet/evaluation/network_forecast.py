"""The forecast of a trained network, for comparison with the naive baselines of `forecasts.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from crevnet.evaluation.forecasts import Window
from crevnet.networks.config import Feedback, ModelConfig
from crevnet.networks.video_model import VideoModel

StaticOf = Callable[[ModelConfig, Window], Tensor | None]


class NetworkForecast:
    """A trained network as a forecast. Its input is the last frames, as many as in its training.

    Args:
        network: the trained network.
        static_of: returns the static channels (B, S, H, W) of a model for a batch of windows, or None.
        feedback: input of CrevNet's next step, by default latents. Other models always feed back frames.
        horizon: number of frames to forecast, by default that of its training.
    """

    def __init__(
        self,
        network: VideoModel[Any],
        static_of: StaticOf,
        feedback: Feedback | None = None,
        horizon: int | None = None,
    ) -> None:
        self._network = network.eval()
        self._static_of, self._horizon = static_of, horizon
        self._options = {} if feedback is None else {"feedback": feedback}

    def __call__(self, past: Tensor, window: Window) -> Tensor:
        config, device = self._network.config, next(self._network.parameters()).device
        static = self._static_of(config, window)
        seen = past[:, -config.past :].to(device)
        static = None if static is None else static.to(device)
        return self._network.generate(seen, static, self._horizon, **self._options).to(past)
