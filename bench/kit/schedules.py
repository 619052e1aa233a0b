"""Training steps of each model under each schedule, which selects the activations to store and those to recompute.

- plain: standard autograd, which stores every activation.
- checkpoint: PyTorch's activation checkpointing of every block, or of every cell of a recurrent model.

Only for CrevNet:

- reversible-autoencoder: revflow for encoder and decoder. The predictor's activations are stored.
- reversible: revflow also through time. The predictor's states are stored in float32. `-bfloat16`, `-offloaded` and `-every-3`
  store them by those settings of ReversibleRecurrence's `states`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import revflow
from crevnet import MODELS, PRESETS, CrevNet, CrevNetConfig, ModelConfig, VideoModel, make_network
from crevnet.networks.baselines import convlstm, prednet, predrnn, predrnnpp, unet, vpn
from crevnet.networks.baselines.recurrent import StackedConfig
from revflow import States

Precision = Literal["32-true", "16-mixed"]

PATCHED = tuple(name for name, model in MODELS.items() if issubclass(model.config, StackedConfig))


@dataclass(frozen=True)
class Schedule:
    states: States = "kept"
    context: Callable[[], AbstractContextManager[None]] = nullcontext
    """Of the forward pass."""
    predictor: Callable[[], AbstractContextManager[None]] = nullcontext
    """Of the predictor's part of it."""
    checkpoints: bool = False


SCHEDULES = {
    "plain": Schedule(context=revflow.ordinary_autograd),
    "checkpoint": Schedule(context=revflow.ordinary_autograd, checkpoints=True),
    "reversible-autoencoder": Schedule(predictor=revflow.ordinary_autograd),
    "reversible": Schedule(),
    "reversible-bfloat16": Schedule("bfloat16"),
    "reversible-offloaded": Schedule("offloaded"),
    "reversible-every-3": Schedule(3),
}

# The methods of each module to checkpoint: their outputs are stored, and all else is recomputed.
CHECKPOINTED: dict[type[nn.Module], tuple[str, ...]] = {
    revflow.RecurrentCell: ("update", "mix"),
    convlstm.ConvLSTMCell: ("forward",),
    predrnn.STLSTMCell: ("forward",),
    predrnnpp.CausalLSTMCell: ("forward",),
    predrnnpp.GradientHighwayUnit: ("forward",),
    prednet.Representation: ("forward",),
    vpn.ResidualMultiplicativeBlock: ("forward",),
    unet.Block: ("forward",),
    unet.UpBlock: ("forward",),
}


@dataclass(frozen=True)
class Training:
    """A model, and the size of its input. Its methods make everything, so that a measurement can include that.

    Every model's input is the data's three channels and the road map.
    """

    preset: str
    """CrevNet's."""
    schedule: str
    precision: Precision
    batch: int
    steps: int
    """Time steps: frames that are predicted from the previous frame."""
    height: int
    width: int
    device: torch.device
    model: str = "crevnet"
    patch: int = 1
    """Of the baselines: edge of the square of pixels that they take as one."""
    blocks: int | None = None
    """CrevNet's reversible blocks in each stage; the preset's if not given."""

    @property
    def config(self) -> CrevNetConfig:
        config = replace(PRESETS[self.preset], states=SCHEDULES[self.schedule].states, memory_budget="min")
        return replace(config, blocks=(self.blocks,) * len(config.blocks)) if self.blocks else config

    def parameters(self) -> int:
        """Bytes."""
        return _parameters(replace(self, schedule="plain", batch=1))

    def trainee(self) -> tuple[VideoModel[Any], list[Tensor]]:
        """A new network, and a window of frames and the road map that go with it."""
        shape = (self.height, self.width)
        frames = torch.rand(self.batch, self.steps + 1, self.config.channels, *shape, device=self.device)
        static = torch.rand(self.batch, 1, *shape, device=self.device)
        with self.device:
            network = self.network()
        return network, [frames, static]

    def loss(self, network: VideoModel[Any], inputs: list[Tensor]) -> Tensor:
        with SCHEDULES[self.schedule].context(), self._autocast():
            frames, static = inputs
            return network.loss(frames, static)

    def train(self, watch: Callable[[Callable[[], Tensor]], Tensor] = lambda forward: forward()) -> Iterator[None]:
        """Training steps with fused Adam, whose state exists before the first. `watch` must call each forward pass."""
        network, inputs = self.trainee()
        optimizer = torch.optim.Adam(network.parameters(), lr=2e-4, fused=True)
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # makes the state, and changes nothing
        while True:
            optimizer.zero_grad()
            watch(lambda: self.loss(network, inputs)).backward()
            optimizer.step()
            yield

    def network(self) -> VideoModel[Any]:
        """A new network, on torch's default device."""
        network = make_network(self.config if self.model == "crevnet" else self._baseline())
        if isinstance(network, CrevNet):
            predictor, context = network.predictor, SCHEDULES[self.schedule].predictor
            predictor.forward = _within(context, predictor.forward)  # type: ignore[method-assign]
        if SCHEDULES[self.schedule].checkpoints:
            _checkpoint_blocks(network)
        return network

    def _baseline(self) -> ModelConfig:
        """With the windows of `paper`, which predict 3 frames."""
        horizon = min(3, self.steps)
        config = MODELS[self.model].config(self.model, past=self.steps + 1 - horizon, horizon=horizon)
        return replace(config, patch=self.patch) if isinstance(config, StackedConfig) else config

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.float16) if self.precision == "16-mixed" else nullcontext()


@cache
def _parameters(training: Training) -> int:
    with torch.device("meta"):
        return sum(p.nbytes for p in training.network().parameters())


def _within(context: Callable[[], AbstractContextManager[None]], function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        with context():
            return function(*arguments, **options)

    return call


def _checkpoint_blocks(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, revflow.AdditiveCoupling):
            for conditioner in module.children():
                _checkpoint(conditioner, "forward")
        for kind, methods in CHECKPOINTED.items():
            if isinstance(module, kind):
                for method in methods:
                    _checkpoint(module, method)


def _checkpoint(module: nn.Module, method: str) -> None:
    function = getattr(module, method)

    def checkpointed(*arguments: Any) -> Any:
        # No module draws random numbers.
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)

    setattr(module, method, checkpointed)
