"""Types of what passes through a block: streams, gradients and context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

S = TypeVar("S", list[Tensor], list[Tensor | None], tuple[bool, ...])
Tensors = tuple[Tensor, ...]
Streams = Tensors
"""The tensors that pass from block to block; a coupling changes some of them and reads the others."""
Context = dict[str, Any]
"""The keyword arguments of a call, which reach every conditioner."""
Gradients = Sequence[Tensor | None]


class CellValues(NamedTuple):
    """The input of a recurrent cell, or its output."""

    streams: Streams
    state: Tensors
    memory: Tensors


def versions_of(streams: Sequence[Tensor]) -> list[int]:
    """The number of changes in place of each stream, as PyTorch counts them."""
    try:
        return [s._version for s in streams]
    except RuntimeError:  # tensors of inference_mode have no version
        return []


def as_streams(value: object) -> Streams:
    """A block's result, if it is a tuple of tensors; TypeError if not."""
    if isinstance(value, tuple) and value and all([isinstance(s, Tensor) for s in value]):
        return value
    raise TypeError(f"a block must return a tuple of tensors, one per stream; this one returned {described(value)}")


def described(value: object) -> str:
    """A tensor's shape or another value's type, for an error message."""
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def rotate(items: S, by: int) -> S:
    """The items, rotated to the left."""
    return items[by:] + items[:by] if by else items
