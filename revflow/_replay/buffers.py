"""Buffers that an evaluation may change: what they were before it, and copies of them to be changed at will."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Slots = dict[str, Tensor | None]

_SMALL = 1024
"""Values of a buffer that is kept on a GPU without a comparison, for which the CPU would have to wait."""


class Buffer:
    """A buffer in a module's slot."""

    __slots__ = ("_buffers", "_identity", "_name", "_own", "_version", "before")

    def __init__(self, buffers: Slots, name: str) -> None:
        self._buffers, self._name = buffers, name
        self.before: Tensor | None = None
        """Its value before the first evaluation, if that changed it."""
        self._own: Tensor | None = None
        self._version = self._identity = 0

    def take(self) -> None:
        """The first evaluation is about to begin."""
        self._own = self._buffers[self._name]
        if self._own is not None:
            self._version, self.before, self._identity = self._own._version, self._own.clone(), id(self._own)

    def keep_if_changed(self) -> None:
        now = self._buffers[self._name]
        if now is None or (now is self._own and not self._is_changed(now)):
            self.before = None
        self._own = None

    def _is_changed(self, now: Tensor) -> bool:
        # By value: fused observers, and writes to `.data`, do not raise the version counter.
        if now._version != self._version or type(now) is not Tensor or self.before is None:
            return now._version != self._version
        if now.device.type == "cpu":
            return not torch.equal(now, self.before)
        return now.is_cuda and now.numel() <= _SMALL

    def lend(self, copies: dict[int, Tensor]) -> None:
        """Put a copy in the buffer's place, with its value before the first evaluation; one copy if it has two places."""
        self._own = own = self._buffers[self._name]
        if own is not None:
            identity = self._identity or id(own)
            if identity not in copies:
                copies[identity] = (own if self.before is None else self.before).clone()
            self._buffers[self._name] = copies[identity]

    def give_back(self) -> str | None:
        """Returns the buffer's name if the evaluation left a tensor of its graph in it."""
        left = self._buffers.get(self._name)
        self._buffers[self._name], self._own = self._own, None
        return f"{self._name} (a buffer)" if left is not None and left.requires_grad else None


def buffers_of(module: nn.Module) -> list[Buffer]:
    return [Buffer(module._buffers, name) for name, buffer in module._buffers.items() if buffer is not None]
