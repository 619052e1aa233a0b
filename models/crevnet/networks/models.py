"""Every model by its name: `make_network(MODELS["predrnn"].config(patch=2))` makes one."""

from __future__ import annotations

from typing import Any, NamedTuple

from crevnet.networks import baselines
from crevnet.networks.config import CrevNetConfig, ModelConfig
from crevnet.networks.crevnet.network import CrevNet
from crevnet.networks.video_model import VideoModel


class Model(NamedTuple):
    """A model's parts."""

    config: type[ModelConfig]
    network: type[VideoModel[Any]]


MODELS: dict[str, Model] = {
    "crevnet": Model(CrevNetConfig, CrevNet),
    "convlstm": Model(baselines.ConvLSTMConfig, baselines.ConvLSTM),
    "predrnn": Model(baselines.PredRNNConfig, baselines.PredRNN),
    "predrnnpp": Model(baselines.PredRNNPlusPlusConfig, baselines.PredRNNPlusPlus),
    "vpn": Model(baselines.VPNConfig, baselines.VPN),
    "prednet": Model(baselines.PredNetConfig, baselines.PredNet),
    "unet": Model(baselines.UNetConfig, baselines.UNet),
}


def make_network(config: ModelConfig) -> VideoModel[Any]:
    """A new network of that configuration, with random weights.

    Examples:
        >>> config = crevnet.CrevNetConfig(channels=1, static=(), blocks=(1,), strides=(2,), modules=2)
        >>> type(crevnet.make_network(config)).__name__
        'CrevNet'
    """
    return MODELS[config.name].network(config)
