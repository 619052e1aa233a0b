"""The arguments of a call without their values: constants, while PyTorch traces bytecode."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from revflow._base.streams import Context
from revflow._base.torch_capture import hint_of


class Given(NamedTuple):
    """A tensor argument of the call, without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def kind_of(tensor: Tensor) -> tuple[Any, ...]:
    """The fields of a `Given`."""
    return tuple([hint_of(n) for n in tensor.shape]), tensor.dtype, tensor.device


def make_static(tensors: Sequence[Tensor]) -> None:
    """Make PyTorch compile another graph for tensors of other sizes: a plan of memory is that of one size."""
    for tensor in tensors:
        for size in tensor.shape:
            operator.index(size)


def made(given: Given) -> Tensor:
    """A tensor of this kind; in a fake-tensor mode, without data."""
    return torch.empty(given.shape, dtype=given.dtype, device=given.device, requires_grad=given.dtype.is_floating_point)


def constants_of(context: Context) -> tuple[tuple[tuple[Any, ...], ...], tuple[tuple[str, Any], ...]]:
    """The names and kinds of the tensors among the keyword arguments, and the other arguments with their names."""
    tensors = tuple([(name, *kind_of(value)) for name, value in context.items() if isinstance(value, Tensor)])
    return tensors, tuple(
        [(name, _constant(value)) for name, value in context.items() if not isinstance(value, Tensor)]
    )


def _constant(value: Any) -> Any:
    """The value. PyTorch takes a number that has changed between two calls as a variable, until code depends on its digits."""
    if isinstance(value, float):
        return float.fromhex(value.hex())
    return operator.index(value) if isinstance(value, int) and not isinstance(value, bool) else value


def objection_to(others: Sequence[tuple[str, Any]]) -> str:
    """The reason why a call with these keyword arguments, which are not tensors, cannot be captured; empty if there is none."""
    if all([value is None or isinstance(value, (bool, int, float, str)) for _, value in others]):
        return ""
    return "a keyword argument is neither a tensor nor a number, a string or None"


def filled_without_data(context: dict[str, Any]) -> Context:
    """The keyword arguments, with a tensor in the place of each `Given`."""
    return {name: made(value) if isinstance(value, Given) else value for name, value in context.items()}
