"""PyTorch's random generators: their states, and which evaluations drew from them."""

from __future__ import annotations

import ctypes
import os
import threading

import torch
from torch import Tensor

evaluation_lock = threading.RLock()
"""Held during an evaluation that may draw random numbers or change a module.

Two threads may train the same network, and all networks share the random generators.
"""


class Drawing:
    """An evaluation that may draw random numbers."""

    random: list[Tensor] | None = None
    """The random states before the evaluation, if it drew from them."""


class Draws:
    """Finds which of the first evaluations in a call drew random numbers.

    The states before an evaluation are compared with those before the next one, so that they are read once per evaluation. If
    the states differ, the former are stored in the evaluation's `random`.
    """

    def __init__(self) -> None:
        self._last: tuple[Drawing, torch.device, list[Tensor]] | None = None

    def begin(self, drawing: Drawing, device: torch.device) -> None:
        """Must be called directly before the evaluation `drawing`."""
        states = random_states(device)
        if self._last is not None:
            self._settle(self._last, states)
        self._last = drawing, device, states

    def end(self) -> None:
        """Must be called after the last evaluation."""
        if self._last is not None:
            with evaluation_lock:  # a second evaluation in another thread restores earlier states while it runs
                states = random_states(self._last[1])
            self._settle(self._last, states)
            self._last = None

    def _settle(self, last: tuple[Drawing, torch.device, list[Tensor]], states: list[Tensor]) -> None:
        """Store the states before the last evaluation in it, if `states`, those after it, differ."""
        drawing, _, before = last
        if len(before) != len(states):  # the next evaluation is on another device
            drawing.random = before
            return
        for a, b in zip(before, states, strict=True):
            # Compared by memcmp, not by an operation of PyTorch: fake-tensor modes and memory trackers would see that.
            if _memcmp(a.data_ptr(), b.data_ptr(), a.nbytes):
                drawing.random = before


def random_states(device: torch.device) -> list[Tensor]:
    """The state of the CPU's generator, then that of the device's generator if it has its own."""
    cpu = torch.default_generator.get_state()
    return [cpu] if device.type in ("cpu", "meta") else [cpu, torch.get_device_module(device).get_rng_state(device)]


def restore_random_states(states: list[Tensor], device: torch.device) -> None:
    """Set the generators to the states that `random_states` returned for this device."""
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.get_device_module(device).set_rng_state(state, device)


_memcmp = (ctypes.cdll.msvcrt if os.name == "nt" else ctypes.CDLL(None)).memcmp
_memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
