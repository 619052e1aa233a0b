"""PyTorch's random generators: their states, and which evaluations drew from them."""

from __future__ import annotations

import ctypes
import os
import threading

import torch
from torch import Tensor

alone = threading.RLock()
"""Held by an evaluation that may draw random numbers or change a module: two threads may train one network, or two networks
with one random generator."""


class Drawing:
    """An evaluation that may draw random numbers."""

    random: list[Tensor] | None = None
    """The random states before it, if it drew from them."""


class Draws:
    """Which of a chain's first evaluations drew random numbers.

    The state before an evaluation is compared with the one before the next: so that one state is read for each. It stays
    with the first of the two, in `Drawing.random`, if they differ.
    """

    def __init__(self) -> None:
        self._last: tuple[Drawing, torch.device, list[Tensor]] | None = None

    def begin(self, drawing: Drawing, device: torch.device) -> None:
        """The evaluation of `drawing` is about to begin."""
        states = random_states(device)
        if self._last is not None:
            self._settle(self._last, states)
        self._last = drawing, device, states

    def end(self) -> None:
        """All evaluations are done."""
        if self._last is not None:
            with alone:  # a second evaluation in another thread may have put an earlier state there for a time
                states = random_states(self._last[1])
            self._settle(self._last, states)
            self._last = None

    def _settle(self, last: tuple[Drawing, torch.device, list[Tensor]], states: list[Tensor]) -> None:
        drawing, _, before = last
        if len(before) != len(states):  # another device
            drawing.random = before
            return
        for a, b in zip(before, states, strict=True):
            # Compared in place and behind the dispatcher: fake-tensor modes and memory trackers must not see these tensors.
            if _memcmp(a.data_ptr(), b.data_ptr(), a.nbytes):
                drawing.random = before


def random_states(device: torch.device) -> list[Tensor]:
    """The state of the CPU's generator, and of the device's if that is another."""
    cpu = torch.default_generator.get_state()
    return [cpu] if device.type in ("cpu", "meta") else [cpu, torch.get_device_module(device).get_rng_state(device)]


def restore_random_states(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.get_device_module(device).set_rng_state(state, device)


_memcmp = (ctypes.cdll.msvcrt if os.name == "nt" else ctypes.CDLL(None)).memcmp
_memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
