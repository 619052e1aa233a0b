"""The values that the guard compares, of streams and of activations.

A block that stores the outputs of its conditioners recomputes its input from them. So the input is right even if the second
evaluation of a conditioner differs from the first, and only the gradients would be wrong. Therefore the guard also compares a few
values of such a conditioner's last activations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from revflow._base.streams import Streams
from revflow._base.torch_private import unwrapped
from revflow.exact import fingerprint

_WIDE = torch.float32, torch.float64


class Compared(Protocol):
    """The record of a block, with the attributes that are used here."""

    before: list[Tensor]
    of_activations: list[tuple[range, range]]


def counts(stream: Tensor) -> bool:
    """Whether a stream is compared. Empty ones have no values; integers have neither gradients nor rounding errors."""
    return bool(stream.numel()) and (stream.is_floating_point() or stream.is_complex())


def extremes(streams: Streams) -> list[Tensor]:
    """The smallest and the largest value of each stream. Each takes one pass over the stream, and no copy."""
    values = [v for v in map(unwrapped, streams) if counts(v)]
    parts = [torch.view_as_real(v.resolve_conj()) if v.is_complex() else v for v in values]
    return [end for part in parts for end in (part.amin(), part.amax())]


def samples_of(tensors: Sequence[Tensor], places: Callable[[Tensor], Tensor], is_exact: bool) -> Streams:
    """Values of each tensor at its `places`, in float32 or float64; in exact arithmetic each followed by its fingerprint."""
    samples: list[Tensor] = []
    for tensor in filter(Tensor.numel, tensors):
        values = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
        taken = torch.take(values, places(values))
        samples.append(taken if taken.dtype in _WIDE else taken.to(torch.float32))
        if is_exact:
            samples.append(fingerprint(values if values.is_floating_point() else values.to(torch.float32)))
    return tuple(samples)


def rescale(blocks: Sequence[Compared], errors: list[float], sizes: list[float]) -> None:
    """Make the errors of activations comparable to those of streams, in place.

    The `errors` and `sizes` are those of all blocks' values. An error relative to the activation becomes one relative to the
    conditioner's result: the error that the block's input would have if it were recomputed from the second evaluation.
    """
    begin = 0
    for block in blocks:
        for activations, result in block.of_activations:
            size = max([sizes[begin + k] for k in result], default=0.0)
            for k in activations:
                errors[begin + k] *= size / (sizes[begin + k] or 1.0)
            for k in (*activations, *result):
                sizes[begin + k] = 0.0
        begin += len(block.before)
