"""Functions of PyTorch that treat fake tensors differently from others, replaced while a step runs without data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from revflow._base.torch_private import FakeTensor


@contextmanager
def fake_tensors_like_others() -> Iterator[None]:
    """Let `nn.Module.to`, `copy.deepcopy` and `format` treat fake tensors as they treat others, with the same use of memory."""
    replaced = [(owner, name, getattr(owner, name)) for owner, name, _ in _FOR_FAKE_TENSORS]
    for owner, name, function in _FOR_FAKE_TENSORS:
        setattr(owner, name, function)
    try:
        yield
    finally:
        for owner, name, function in replaced:
            setattr(owner, name, function)


_swap_tensors: Callable[..., None] = torch.utils.swap_tensors
_deepcopy: Callable[..., Tensor] = Tensor.__deepcopy__
_format: Callable[..., str] = Tensor.__format__


def _assign_converted(parameter: Any, converted: Any) -> None:
    """Convert a parameter by assigning to its `data`. PyTorch swaps fake parameters, which frees the old values later."""
    try:
        parameter.data, parameter.fake_device = converted.data, converted.fake_device
    except (RuntimeError, AttributeError):  # The types differ: from the meta device to another, for example.
        _swap_tensors(parameter, converted)


def _deepcopy_by_clone(tensor: Any, memo: dict[int, Any]) -> Any:
    """Copy a tensor by an operator. PyTorch copies storages, and attributes of fake tensors that must not be copied."""
    if not tensor.is_leaf:
        return _deepcopy(tensor, memo)
    if id(tensor) not in memo:
        copied = tensor.detach().clone()
        if isinstance(tensor, nn.Parameter):
            copied = nn.Parameter(copied, tensor.requires_grad)
        elif tensor.grad is not None:
            copied.grad = _deepcopy_by_clone(tensor.grad, memo)
        memo[id(tensor)] = copied.requires_grad_(tensor.requires_grad)
    return memo[id(tensor)]


def _format_number(tensor: Any, spec: str) -> str:
    """Format a tensor without dimensions as its number. PyTorch formats the number of a tensor with data only."""
    if isinstance(tensor, FakeTensor) and tensor.dim() == 0:
        return format(tensor.item(), spec)
    return _format(tensor, spec)


_FOR_FAKE_TENSORS: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
    (torch.utils, "swap_tensors", _assign_converted),
    (Tensor, "__deepcopy__", _deepcopy_by_clone),
    (Tensor, "__format__", _format_number),
)
