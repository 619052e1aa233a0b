"""PyTorch's names for code that torch.compile traces, which are not public, or that differ between its releases."""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch.func import vjp
from torch.fx.experimental import symbolic_shapes
from torch.nn.utils.stateless import _reparametrize_module

reparametrized: Callable[..., AbstractContextManager[None]] = partial(_reparametrize_module, tie_weights=True)
"""A context in which a module has other parameters and buffers. `torch.func.functional_call` is that around a call."""


def pullback(function: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[..., Any]]:
    """The function's value, and the map from gradients of its value to gradients of the primals: `torch.func.vjp`."""
    value, pull = vjp(function, *primals)  # type: ignore[misc]
    return value, pull


def break_graph(reason: str) -> None:
    """End the graph that torch.compile captures. With `fullgraph=True`, that is an error with this reason."""
    torch._dynamo.graph_break(msg=reason)


def has_hooks_of_saved_tensors() -> bool:
    """Whether the current code runs within a context of `saved_tensors_hooks`."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


hint_of: Callable[[Any], int] = getattr(symbolic_shapes, "guarding_hint_or_throw", operator.index)
"""A size while torch.compile traces: of a dynamic dimension, that of the example input. The graph stays valid for others."""


def arguments_of(function: Any) -> list[Any]:
    """The arguments in an operator's schema."""
    return list(function._schema.arguments)


_depth_of_transforms = getattr(torch._C._functorch, "get_dynamic_layer_stack_depth", None)

CAN_BE_CAPTURED = _depth_of_transforms is not None
"""Whether this release of PyTorch can trace a captured sequence."""


def is_transformed_in_a_graph() -> bool:
    """As `is_transformed`, while torch.compile traces the current code: it replaces the function called there by a constant."""
    return _depth_of_transforms is not None and bool(_depth_of_transforms())
