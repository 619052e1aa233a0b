"""PyTorch's names that are not public, or that differ between its releases since 2.6."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor as fake_tensor
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
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
from torch.utils._mode_utils import no_dispatch as no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass as is_traceable_wrapper_subclass
from torch.utils.checkpoint import CheckpointFunction

F = TypeVar("F", bound=Callable[..., Any])

BatchNorm = batchnorm._BatchNorm
pytree = _pytree

# PyTorch 2.6 lacks the flag. There, a network can be exported only under no_grad. In compiled code, 2.11's function is true.
is_exporting: Callable[[], bool] = lambda: getattr(torch.compiler, "_is_exporting_flag", False)  # noqa: E731

backward_pass: Callable[[], int] = torch._C._current_graph_task_id
"""The number of the backward pass that this thread runs; -1 outside of a backward pass."""
is_going_to_run: Callable[[Any], bool] = torch._C._will_engine_execute_node
"""Whether the running backward pass is going to run this node."""
current_node: Callable[[], Any] = torch._C._current_autograd_node
"""The node that this thread evaluates in a backward pass."""
run_backward: Callable[..., Any] = torch.autograd.Variable._execution_engine.run_backward
"""The core of torch.autograd.grad. The checks of arguments that it omits take as long as a small conditioner's backward pass."""
set_grad_enabled: Callable[[bool], None] = torch._C._set_grad_enabled
"""The function below torch.set_grad_enabled, without the cost of a context manager."""
unseen_by_modes: Callable[[], AbstractContextManager[None]] = torch._C.DisableTorchFunction
"""A context in which no mode of `__torch_function__` sees what is called."""
is_any_autocast: Callable[[], bool] = torch._C._is_any_autocast_enabled
"""Whether autocast is on for any device type."""
has_internal_overlap: Callable[[Tensor], int] = torch._debug_has_internal_overlap
"""Whether several entries of a tensor share memory: 0 if they do not, 1 if they do, 2 if that is not known."""
is_traced: Callable[[], bool] = torch._C._is_tracing
"""Whether torch.jit.trace runs."""

ReentrantCheckpoint: type = CheckpointFunction._backward_cls
"""The type of the autograd nodes of `torch.utils.checkpoint` with use_reentrant=True."""


def node_type(function: type[torch.autograd.Function]) -> type:
    """The type of the nodes that an autograd Function leaves in a graph."""
    return function._backward_cls


def packet_of(operator: Any) -> Any:
    """The operator without its overload, as `torch.utils.flop_counter` lists it."""
    return operator._overloadpacket


_count_holders = getattr(torch._C, "_storage_Use_Count", None)


def holders(storage: torch.UntypedStorage) -> int | None:
    """The number of tensors and storages that refer to these bytes; None in old CPU builds of PyTorch, such as 2.6's."""
    return None if _count_holders is None else _count_holders(storage._cdata)


def has_global_hook() -> bool:
    """Whether a hook is registered that every module calls."""
    return bool(
        _global_backward_pre_hooks or _global_backward_hooks or _global_forward_pre_hooks or _global_forward_hooks
    )


def has_own_hook(module: nn.Module) -> bool:
    """Whether a call of this module would run a hook that was registered on it."""
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def is_compiled(module: nn.Module) -> bool:
    """Whether a call of this module runs compiled code."""
    own = module.__dict__
    return module._compiled_call_impl is not None or any(
        [
            method in own and hasattr(own[method], "_torchdynamo_orig_callable")
            for method in ("forward", "update", "mix")
        ]
    )


def compile_call(module: nn.Module, **options: Any) -> None:
    """Compile the module's call, in place, hooks included.

    `nn.Module.compile` compiles nothing of an `nn.Sequential`, because dynamo starts at no frame of torch's own. It starts
    at this one.
    """

    def call(*inputs: Any, **context: Any) -> Any:
        return module._call_impl(*inputs, **context)

    module._compiled_call_impl = torch.compile(call, **options)


def not_compiled(reason: str) -> Callable[[F], F]:
    """`torch.compiler.disable`. Whole-graph capture shows the reason from PyTorch 2.7 on."""
    known = "reason" in inspect.signature(torch.compiler.disable).parameters
    return torch.compiler.disable(**({"reason": reason} if known else {}))  # type: ignore[no-any-return]


def hooks_saved_tensors() -> bool:
    """Whether hooks replace tensors that are saved now: those of `torch.utils.checkpoint` or `save_on_cpu`, for example."""
    node: Any = torch.empty(0, requires_grad=True).exp().grad_fn
    try:
        node._raw_saved_result.register_hooks(lambda tensor: tensor, lambda tensor: tensor)
    except RuntimeError:  # It has hooks already. PyTorch 2.6 offers no other test.
        return True
    return False


def allow_recompilations(count: int) -> None:
    """Raise dynamo's limit of recompilations per function (8) to `count`. At the limit, PyTorch runs the function uncompiled."""
    config = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # its name in PyTorch 2.6
    setattr(config, limit, max(getattr(config, limit), count))


def caches_parametrizations() -> bool:
    """Whether the current code runs within `parametrize.cached()`."""
    return bool(parametrize._cache_enabled)


def parametrization_cache() -> dict[Any, Any]:
    """The tensors that `parametrize.cached()` stores."""
    return parametrize._cache


def set_parametrization_cache(cache: dict[Any, Any]) -> None:
    """Replace the tensors that `parametrize.cached()` stores."""
    parametrize._cache = cache


def checkpointed_call() -> object | None:
    """An object that identifies the innermost running call of `torch.utils.checkpoint`; None outside of such a call.

    The recomputation of a call yields the same object as the call. PyTorch stores it in a closure of the call's hooks for saved
    tensors. Its name is `frame` during the forward pass. During the recomputation it is `target_frame_ref`, a weak reference.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None or getattr(hooks[0], "__module__", "") != "torch.utils.checkpoint":
        return None
    pack = inspect.unwrap(hooks[0])
    cells = dict(zip(pack.__code__.co_freevars, pack.__closure__ or (), strict=True))
    if "frame" in cells:
        return cells["frame"].cell_contents  # type: ignore[no-any-return]
    return cells["target_frame_ref"].cell_contents() if "target_frame_ref" in cells else None


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor, or the one that a subclass wraps: this process's shard of a DTensor, the values of a jagged tensor."""
    if type(tensor) is Tensor or isinstance(tensor, FakeTensor):
        return tensor
    if is_traceable_wrapper_subclass(tensor):
        inner = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        return unwrapped(next(i for i in inner if isinstance(i, Tensor)))
    return tensor.as_subclass(Tensor)


@contextmanager
def unchanged_versions(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Hide changes of these tensors in place, such as those of an embedding that scales its rows to `max_norm` in each call."""
    with ExitStack() as versions:
        for tensor in tensors:  # PyTorch 2.6 accepts only one.
            versions.enter_context(torch.autograd._unsafe_preserve_version_counter(tensor))  # type: ignore[attr-defined]
        yield


def at_the_end(callback: Callable[[], None]) -> None:
    """Call `callback` at the end of the running backward pass. If the pass fails, the callback is dropped."""
    engine: Any = torch.autograd.Variable._execution_engine
    engine.queue_callback(callback)


def is_forward_ad() -> bool:
    """Whether the current code runs under forward-mode AD."""
    return forward_ad._current_level >= 0


def is_transformed() -> bool:
    """Whether the current code runs under a transform of torch.func."""
    return torch._C._functorch.peek_interpreter_stack() is not None
