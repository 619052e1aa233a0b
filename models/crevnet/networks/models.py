"""All models by name: `make_network(MODELS["predrnn"].config(patch=2))` creates one."""

from __future__ import annotations

from importlib import import_module
from typing import Any, get_args

from crevnet.networks.config import ModelConfig, ModelName
from crevnet.networks.video_model import Model, VideoModel


def model_named(name: str) -> Model:
    """The `MODEL` of the file that has the model's name."""
    file = "crevnet.network" if name == "crevnet" else f"baselines.{name}"
    model: Model = import_module(f"crevnet.networks.{file}").MODEL
    return model


MODELS: dict[str, Model] = {name: model_named(name) for name in get_args(ModelName)}


def make_network(config: ModelConfig) -> VideoModel[Any]:
    """Create a network with random weights from a configuration.

    Examples:
        >>> config = crevnet.CrevNetConfig(channels=1, static=(), blocks=(1,), strides=(2,), modules=2)
        >>> type(crevnet.make_network(config)).__name__
        'CrevNet'
    """
    return MODELS[config.name].network(config)
