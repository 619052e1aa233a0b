"""A training step of each model under each schedule: what its forward pass keeps, and what its backward pass computes again.

- plain: every activation is kept.
- checkpoint: PyTorch's activation checkpointing of every block, or cell of a recurrent model.

CrevNet alone:

- reversible-autoencoder: revflow for encoder and decoder; the predictor's activations are kept.
- reversible: revflow, through time too. The predictor's states are kept as they are; `-bfloat16`, `-offloaded` and `-every-3`
  keep them as ReversibleRecurrence's `states` say.
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
from crevnet import MODELS, PRESETS, CrevNetConfig, VideoModel, make_network
from crevnet.networks.baselines import StackedConfig, convlstm, prednet, predrnn, predrnnpp, unet, vpn
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

# What is checkpointed of each, and by which method: its outputs are kept, and all else computed again.
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
    """A model to be trained, and on what; everything is made by its methods, so that they can be measured.

    Every model sees the data's three channels and the road map.
    """

    preset: str
    """CrevNet's."""
    schedule: str
    precision: Precision
    batch: int
    steps: int
    """Time steps: frames that are predicted from the frame before."""
    height: int
    width: int
    device: torch.device
    model: str = "crevnet"
    patch: int = 1
    """Of the baselines: they see so many times so many pixels as one."""
    blocks: int | None = None
    """CrevNet's reversible blocks in each stage; the preset's if not given."""

    @property
    def config(self) -> CrevNetConfig:
        config = replace(PRESETS[self.preset], states=SCHEDULES[self.schedule].states)
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
            return network.loss(*inputs)

    def train(self, watch: Callable[[Callable[[], Tensor]], Tensor] = lambda forward: forward()) -> Iterator[None]:
        """Training steps, with fused Adam, whose state is there before the first; `watch` is to call each forward pass."""
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
        """A new one, on torch's default device."""
        if self.model == "crevnet":
            network = make_network(self.config)
            network.predictor.forward = _within(SCHEDULES[self.schedule].predictor, network.predictor.forward)
        else:
            # The windows of `paper`: 3 frames are to be predicted.
            horizon = min(3, self.steps)
            patch = {"patch": self.patch} if self.model in PATCHED else {}
            past = self.steps + 1 - horizon
            network = make_network(MODELS[self.model].config(past=past, horizon=horizon, **patch))
        if SCHEDULES[self.schedule].checkpoints:
            _checkpoint_blocks(network)
        return network

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
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)  # nothing draws

    setattr(module, method, checkpointed)
