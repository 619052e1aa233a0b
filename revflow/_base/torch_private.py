"""What PyTorch's releases since 2.6 name differently, and what they have under no public name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.modules import batchnorm
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)
from torch.nn.utils import parametrize
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass as is_traceable_wrapper_subclass

BatchNorm = batchnorm._BatchNorm
pytree = _pytree

# PyTorch 2.6 cannot tell: there, export under no_grad.
is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)

backward_pass: Callable[[], int] = torch._C._current_graph_task_id
"""The number of the backward pass that this thread runs; -1 outside of one."""
is_going_to_run: Callable[[Any], bool] = torch._C._will_engine_execute_node
"""Whether this backward pass is going to come to a node."""
run_backward: Callable[..., Any] = torch.autograd.Variable._execution_engine.run_backward
"""torch.autograd.grad without its checks of the arguments, which for small conditioners take as long as it does."""
set_grad_enabled: Callable[[bool], None] = torch._C._set_grad_enabled
"""That of PyTorch without its context manager."""
is_any_autocast: Callable[[], bool] = torch._C._is_any_autocast_enabled
has_internal_overlap: Callable[[Tensor], int] = torch._debug_has_internal_overlap
is_traced: Callable[[], bool] = torch._C._is_tracing


def node_type(function: type[torch.autograd.Function]) -> type:
    """The type of the nodes that an autograd Function leaves in a graph."""
    return function._backward_cls


_count_holders = getattr(torch._C, "_storage_Use_Count", None)


def holders(storage: torch.UntypedStorage) -> int | None:
    """How many tensors and storages refer to these bytes; None in old CPU builds of PyTorch, 2.6's among them."""
    return None if _count_holders is None else _count_holders(storage._cdata)


def has_global_hook() -> bool:
    """Whether a hook has been registered that every module calls."""
    return bool(
        _global_backward_pre_hooks or _global_backward_hooks or _global_forward_pre_hooks or _global_forward_hooks
    )


def allow_recompilations(count: int) -> None:
    """Raise dynamo's limit (8 for a function) to `count`; at the limit PyTorch goes on uncompiled."""
    config = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # its name in PyTorch 2.6
    setattr(config, limit, max(getattr(config, limit), count))


def caches_parametrizations() -> bool:
    """Whether this is within `parametrize.cached()`."""
    return bool(parametrize._cache_enabled)


def parametrization_cache() -> dict[Any, Any]:
    """That of `parametrize.cached()`."""
    return parametrize._cache


def set_parametrization_cache(cache: dict[Any, Any]) -> None:
    parametrize._cache = cache


def checkpointed_call() -> object | None:
    """What stands for the innermost call of `torch.utils.checkpoint` that now runs, the same object when it is recomputed."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None or getattr(hooks[0], "__module__", "") != "torch.utils.checkpoint":
        return None
    pack = inspect.unwrap(hooks[0])
    cells = dict(zip(pack.__code__.co_freevars, pack.__closure__ or (), strict=True))
    if "frame" in cells:  # of the forward pass
        return cells["frame"].cell_contents  # type: ignore[no-any-return]
    return cells["target_frame_ref"].cell_contents() if "target_frame_ref" in cells else None


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor, or one that a subclass wraps: this process's shard of a DTensor, the values of a jagged tensor."""
    if type(tensor) is Tensor or isinstance(tensor, FakeTensor):
        return tensor
    if is_traceable_wrapper_subclass(tensor):
        inner = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        return unwrapped(next(i for i in inner if isinstance(i, Tensor)))
    return tensor.as_subclass(Tensor)


@contextmanager
def unchanged_versions(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Hide that these are changed in place: by an embedding, say, that scales its rows down to `max_norm` at each call."""
    if not tensors:
        yield
        return
    with torch.autograd._unsafe_preserve_version_counter(tuple(tensors)):  # type: ignore[attr-defined]
        yield


def at_the_end(callback: Callable[[], None]) -> None:
    """Call it when the backward pass that now runs is through; nothing holds it if that fails."""
    engine: Any = torch.autograd.Variable._execution_engine
    engine.queue_callback(callback)


def is_forward_ad() -> bool:
    """Whether this is within a level of forward-mode AD."""
    return forward_ad._current_level >= 0


def is_transformed() -> bool:
    """Whether one of torch.func's transforms is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None
