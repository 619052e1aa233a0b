"""PyTorch's names for code that torch.compile traces, which are not public, or that differ between its releases."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch._dynamo
import torch._inductor.config
from torch import Tensor
from torch import _higher_order_ops as higher_order_ops
from torch._dispatch.python import suspend_functionalization
from torch._dynamo import symbolic_convert
from torch._guards import TracingContext
from torch._subclasses.functional_tensor import FunctionalTensor, disable_functional_mode
from torch.fx import GraphModule
from torch.fx.experimental import symbolic_shapes
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.nn.utils.stateless import _reparametrize_module

from revflow._base.torch_private import not_compiled
from revflow._base.user_warnings import warn

reparametrized: Callable[..., AbstractContextManager[None]] = _reparametrize_module
"""A context in which a module has other buffers, which torch.compile can trace."""

call_uninlined: Callable[..., Callable[..., Any]] = torch.compiler.allow_in_graph
"""A decorator: torch.compile leaves calls to the function in its first graph, which AOTAutograd then traces without bytecode."""


def break_graph(reason: str) -> None:
    """End the graph that torch.compile captures. With `fullgraph=True`, that is an error with this reason."""
    torch._dynamo.graph_break(msg=reason)


def _graph_in_work() -> Any:
    """The graph that torch.compile captures from bytecode."""
    return symbolic_convert.InstructionTranslator.current_tx().output.graph


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def last_node() -> int:
    """The identity of the last operation so far in the graph that torch.compile captures. Names of operations may change."""
    return id(next(reversed(_graph_in_work().nodes)))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def erase_unused_nodes(after: int, last: int) -> bool:
    """Remove unused operations, after the first of these nodes and to the last, from the graph that torch.compile captures.

    They would run with a backend that runs graphs as they are. For DistributedDataParallel, they would be buckets without output.
    """
    graph = _graph_in_work()
    nodes = [*graph.nodes]
    places = {id(node): place for place, node in enumerate(nodes)}
    for node in reversed(nodes[places[after] + 1 : places[last] + 1]):
        if not node.users and node.op != "placeholder":
            graph.erase_node(node)
    return True


def has_hooks_of_saved_tensors() -> bool:
    """Whether the current code runs within a context of `saved_tensors_hooks`."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


hint_of: Callable[[Any], int] = getattr(symbolic_shapes, "guarding_hint_or_throw", operator.index)
"""A size while torch.compile traces: of a dynamic dimension, that of the example input. The graph stays valid for others."""


def arguments_of(function: Any) -> list[Any]:
    """The arguments in an operator's schema."""
    return list(function._schema.arguments)


CAN_BE_CAPTURED = torch.torch_version.TorchVersion(torch.__version__) >= "2.13"
"""Whether this release of PyTorch can compile a captured sequence. 2.11 cannot trace the function below."""


@not_compiled("revflow is not part of compiled graphs before PyTorch 2.13")
def warn_of_old_release() -> None:
    warn(
        f"revflow runs outside of compiled graphs with PyTorch {torch.__version__}: install 2.13 or later", UserWarning
    )


def is_transformed_in_a_graph() -> bool:
    """As `is_transformed`, while torch.compile traces the current code: it replaces the function called there by a constant."""
    return CAN_BE_CAPTURED and bool(torch._C._functorch.get_dynamic_layer_stack_depth())


def compilation(tensors: Sequence[Tensor]) -> object | None:
    """The running compilation, if AOTAutograd currently traces operations of these tensors."""
    is_traced = any([isinstance(t, FunctionalTensor) for t in tensors])
    return TracingContext.try_get() if is_traced else None


def inner_of(tensor: Tensor) -> Tensor:
    """The tensor that AOTAutograd wraps. It is the same one for two wrappers of one tensor."""
    if not isinstance(tensor, FunctionalTensor):
        return tensor
    torch._sync(tensor)  # type: ignore[attr-defined, no-untyped-call]
    inner: Tensor = torch._from_functional_tensor(tensor.elem)
    return inner


def traced(function: Callable[..., Sequence[Tensor | None]], operands: Sequence[Any]) -> GraphModule:
    """The function's operations on tensors like these, which AOTAutograd traces, with its calls of `torch.autograd.grad`."""
    with suspend_functionalization(), disable_functional_mode(), disable_proxy_modes_tracing():
        tensors = [higher_order_ops.utils._from_fun(t).detach() for t in operands]
        graph: GraphModule = higher_order_ops.utils._maybe_reenter_make_fx(function)(*tensors)
        return graph


def invoke(graph: GraphModule, name: str, operands: Sequence[Any]) -> Sequence[Tensor]:
    """Call a graph that the running compilation compiles once, and that is known there by this name.

    An output must not share memory with an operand, or with another output.
    """
    # Inductor cannot compile such a graph by itself if it gets a tensor of a size like (s + 1) // 2, but not s.
    sizes = [size for t in operands for size in t.shape if isinstance(size, torch.SymInt)]
    is_separate = all([size.node.expr.is_symbol for size in sizes])
    results: Sequence[Tensor] = (
        higher_order_ops.invoke_subgraph(graph, name, *operands) if is_separate else graph(*operands)
    )
    return results


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
