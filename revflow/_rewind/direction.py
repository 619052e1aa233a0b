"""The two directions through a block, one of which a call takes throughout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Direction:
    """Forward, or inverse."""

    name: str
    """The method of a block."""
    apply: str
    """The method of a coupling that changes a stream."""
    undo: str
    """The method of a coupling that inverts `apply`."""
    sign: int
    """1 or -1: of log-determinants; and the order of blocks and conditioners, as the stride of a slice."""

    def method(self, block: object) -> Callable[..., Any]:
        """The block itself, since calling it runs its hooks; or its inverse."""
        return block if self.sign > 0 else block.inverse  # type: ignore[attr-defined, return-value]


FORWARD = Direction("forward", "combine", "separate", 1)
INVERSE = Direction("inverse", "separate", "combine", -1)
