"""Streams, gradients and context: what passes through a block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import Tensor

S = TypeVar("S", list[Tensor], list[Tensor | None], tuple[bool, ...])
Streams = tuple[Tensor, ...]
Context = dict[str, Any]
Gradients = Sequence[Tensor | None]


def versions_of(streams: Sequence[Tensor]) -> list[int]:
    """How often each has been changed in place."""
    try:
        return [s._version for s in streams]
    except RuntimeError:  # within inference_mode they do not tell
        return []


def as_streams(value: object) -> Streams:
    """A block's result, checked to be a tuple of tensors."""
    if isinstance(value, tuple) and value and all([isinstance(s, Tensor) for s in value]):
        return value
    raise TypeError(f"a block has to return a tuple of tensors, one a stream; this one returned {described(value)}")


def described(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def rotate(items: S, by: int) -> S:
    return items[by:] + items[:by] if by else items
