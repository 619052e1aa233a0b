"""A training step of CrevNet under each schedule: what its forward pass keeps, and what its backward pass computes again.

- plain: every activation is kept.
- checkpoint: PyTorch's activation checkpointing of every block, of the autoencoder and of the predictor.
- reversible: revflow. The predictor's states are kept as they are; `-bfloat16`, `-offloaded` and `-every-3` keep them as
  ReversibleRecurrence's `states` say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import revflow
from crevnet import PRESETS, CrevNet
from revflow.recurrence import States

Precision = Literal["32-true", "16-mixed"]


@dataclass(frozen=True)
class Schedule:
    states: States = "kept"
    context: Callable[[], AbstractContextManager[None]] = nullcontext
    checkpoints: bool = False


SCHEDULES = {
    "plain": Schedule(context=revflow.ordinary_autograd),
    "checkpoint": Schedule(context=revflow.ordinary_autograd, checkpoints=True),
    "reversible": Schedule(),
    "reversible-bfloat16": Schedule("bfloat16"),
    "reversible-offloaded": Schedule("offloaded"),
    "reversible-every-3": Schedule(3),
}


@dataclass(frozen=True)
class Training:
    """A CrevNet to be trained, and on what; everything is made by its methods, so that they can be measured."""

    preset: str
    schedule: str
    precision: Precision
    batch: int
    steps: int
    """Time steps: frames that are predicted from the frame before."""
    height: int
    width: int
    device: torch.device

    def parameters(self) -> int:
        """Bytes."""
        with torch.device("meta"):
            return sum(p.nbytes for p in CrevNet(PRESETS[self.preset]).parameters())

    def trainee(self) -> tuple[CrevNet, list[Tensor]]:
        """A new network, and a window of frames and the road map that go with it."""
        schedule = SCHEDULES[self.schedule]
        config = replace(PRESETS[self.preset], states=schedule.states)
        shape = (self.height, self.width)
        frames = torch.rand(self.batch, self.steps + 1, config.channels, *shape, device=self.device)
        roads = [torch.rand(self.batch, 1, *shape, device=self.device)] if config.road_map else []
        with self.device:
            network = CrevNet(config)
        if schedule.checkpoints:
            _checkpoint_blocks(network)
        return network, [frames, *roads]

    def loss(self, network: CrevNet, inputs: list[Tensor]) -> Tensor:
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

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.float16) if self.precision == "16-mixed" else nullcontext()


def _checkpoint_blocks(network: CrevNet) -> None:
    for module in network.modules():
        if isinstance(module, revflow.AdditiveCoupling):
            for conditioner in module.children():
                _checkpoint(conditioner, "forward")
        elif isinstance(module, revflow.RecurrentCell):
            _checkpoint(module, "update")
            _checkpoint(module, "mix")


def _checkpoint(module: nn.Module, method: str) -> None:
    function = getattr(module, method)

    def checkpointed(*arguments: Any) -> Any:
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)  # nothing draws

    setattr(module, method, checkpointed)
