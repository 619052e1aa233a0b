"""Evaluations that leave no trace in a training run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from revflow._replay.buffers import buffers_of
from revflow._replay.random_states import random_states, restore_random_states


@contextmanager
def undisturbed(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Restore the module's buffers and the random states at the end of this context."""
    states = random_states(device)
    buffers = [buffer for m in module.modules() for buffer in buffers_of(m)]
    copies: dict[int, Tensor] = {}
    for buffer in buffers:
        buffer.lend(copies)
    try:
        yield
    finally:
        for buffer in buffers:
            buffer.give_back()
        restore_random_states(states, device)
