"""Buffers that an evaluation may change: their values before it, and copies for it to change."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Slots = dict[str, Tensor | None]
"""A module's buffers or parameters by name."""

_SMALL = 1024
"""The largest number of values of a buffer on a GPU that counts as changed without a comparison.

The CPU would wait for the comparison. Of a larger buffer, only the version counter is read.
"""


class Buffer:
    """A buffer in a module's slot.

    The first evaluation runs between `take` and `drop_if_unchanged`, each further one between `lend` and `give_back`.
    """

    __slots__ = ("_buffers", "_identity", "_name", "_own", "_version", "before")

    def __init__(self, buffers: Slots, name: str) -> None:
        self._buffers, self._name = buffers, name
        self.before: Tensor | None = None
        """The value before the first evaluation, if that changed it."""
        self._own: Tensor | None = None
        self._version = self._identity = 0

    def take(self) -> None:
        """Copy the value before the first evaluation."""
        self._own = self._buffers[self._name]
        if self._own is not None:
            self._version, self.before, self._identity = self._own._version, self._own.clone(), id(self._own)

    def drop_if_unchanged(self) -> None:
        """Drop the copy if the first evaluation left the buffer unchanged."""
        now = self._buffers[self._name]
        if now is None or (now is self._own and not self._is_changed(now)):
            self.before = None
        self._own = None

    def _is_changed(self, now: Tensor) -> bool:
        # Values are compared, since fused observers and writes to `.data` do not raise the version counter.
        if now._version != self._version or type(now) is not Tensor or self.before is None:
            return now._version != self._version
        if now.device.type == "cpu":
            return not torch.equal(now, self.before)
        return now.is_cuda and now.numel() <= _SMALL

    def lend(self, copies: dict[int, Tensor]) -> None:
        """Put a copy with the value before the first evaluation into the slot. A buffer in two slots has one in `copies`."""
        self._own = own = self._buffers[self._name]
        if own is not None:
            identity = self._identity or id(own)
            if identity not in copies:
                copies[identity] = (own if self.before is None else self.before).clone()
            self._buffers[self._name] = copies[identity]

    def give_back(self) -> str | None:
        """Put the module's own buffer back. Returns its name if the evaluation left a tensor with a graph in the slot."""
        left = self._buffers.get(self._name)
        self._buffers[self._name], self._own = self._own, None
        return f"{self._name} (a buffer)" if left is not None and left.requires_grad else None


def buffers_of(module: nn.Module) -> list[Buffer]:
    return [Buffer(module._buffers, name) for name, buffer in module._buffers.items() if buffer is not None]
