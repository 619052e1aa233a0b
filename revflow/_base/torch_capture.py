"""PyTorch's names for code that torch.compile traces, which are not public, or that differ between its releases."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
import torch._dynamo
import torch._inductor.config
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


CompilationError: type[RuntimeError] = torch._dynamo.exc.TorchDynamoException
"""An error of torch.compile, and not of the code that it compiles."""


@contextmanager
def comparable_with_eager() -> Iterator[None]:
    """Within this context, compiled code draws the same random numbers as code that is not compiled.

    Networks that were compiled before do not count for the limit of recompilations, at which PyTorch runs code uncompiled.
    """
    config = torch._dynamo.config
    limits = {name: 2**16 for name in _LIMITS if hasattr(config, name)}
    with config.patch(limits), torch._inductor.config.patch(fallback_random=True):
        yield


_LIMITS = "recompile_limit", "accumulated_recompile_limit", "cache_size_limit", "accumulated_cache_size_limit"
"""Their names since PyTorch 2.7, and in PyTorch 2.6."""


def traced_anew(module: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls the module. PyTorch has not seen its code before, and stores no decisions for it.

    PyTorch stores by code object which functions it cannot trace, and by name which sizes are dynamic.
    """

    def call(*inputs: Any, **context: Any) -> Any:
        return module(*inputs, **context)

    call.__code__ = call.__code__.replace(co_name=f"call_{next(_NUMBERS)}")
    return call


_NUMBERS = itertools.count()


def is_compiled_module(net: object) -> bool:
    """Whether this is the result of `torch.compile(module)`."""
    return isinstance(net, torch._dynamo.OptimizedModule)
