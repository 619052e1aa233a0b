"""The small graphs that inversions build: their leaves, their gradients, and whether a tensor may be overwritten."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge

from revflow._base.streams import Gradients, Streams
from revflow._base.torch_private import (
    FakeTensor,
    has_internal_overlap,
    holders,
    is_traceable_wrapper_subclass,
    run_backward,
    set_grad_enabled,
)

_thread = threading.local()

GradientStart = Tensor | GradientEdge | None


def leaf(tensor: Tensor, strides: tuple[int, ...], needs_grad: bool) -> Tensor:
    """A leaf of a new graph, with the tensor's values and the strides of the first evaluation."""
    return laid_out(tensor, strides).detach().requires_grad_(needs_grad)


def not_leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Aliases of leaves, as inputs of modules other than PyTorch's own.

    Under standard autograd such inputs are not leaves either. The hooks of a leaf must not query which nodes a backward pass
    will reach.
    """
    set_grad_enabled(True)
    aliases = [(_alias(t) if type(t) is Tensor else t.view_as(t)) if t.requires_grad else t for t in tensors]
    set_grad_enabled(False)  # as in every inversion
    return aliases


def aliases_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Aliases for a first evaluation. They have a graph if the evaluation is measured."""
    return [t.view_as(t) if torch.is_grad_enabled() else alias_of(t) for t in tensors]


_alias = torch.ops.aten.alias.default  # keeps strides


def laid_out(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The tensor with these strides (rule 5 of `functions`): itself if it has them, otherwise a copy."""
    if tensor.stride() == strides or is_traceable_wrapper_subclass(tensor):
        return tensor
    laid = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
    own = tuple([slice(None if stride else 1) for stride in strides])  # an expanded dimension holds one value
    laid[own].copy_(tensor[own])
    return laid


def is_ours(stream: Tensor) -> bool:
    """Whether a tensor of the engine may be overwritten: no other tensor, of a graph or of the user, shares its memory."""
    if type(stream) is not Tensor and not isinstance(stream, FakeTensor):
        return False  # a subclass may wrap any number of others
    storage = stream.untyped_storage()  # the second reference to the memory, after the stream's own
    return (
        holders(storage) == 2
        and storage.nbytes() == stream.nbytes
        and storage.resizable()  # memory of NumPy's is not
        and has_internal_overlap(stream) == 0
    )


def alias_of(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


def plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum of two gradients; None means zero."""
    return b if a is None else a if b is None else a + b


class _Quiet:
    """A hook of a parameter that does nothing in the backward pass of an inversion."""

    __slots__ = ("hook",)

    def __init__(self, hook: Callable[[Tensor], Tensor | None]) -> None:
        self.hook = hook

    def __call__(self, gradient: Tensor) -> Tensor | None:
        return None if getattr(_thread, "in_rewind", False) else self.hook(gradient)


def _keep_quiet_in_rewinds(of_tensors: Sequence[dict[int, Any]]) -> None:
    """Wrap the hooks of tensors; `of_tensors` holds the hooks of each."""
    for hooks in of_tensors:
        for number, hook in [*hooks.items()]:
            if type(hook) is not _Quiet:
                hooks[number] = _Quiet(hook)


def edges(outputs: Sequence[Tensor]) -> list[GradientStart]:
    """The starts of a backward pass from `outputs`, whose values may then be freed; None for an output without a graph."""
    return [_edge(o) if o.requires_grad else None for o in outputs]


def _edge(output: Tensor) -> GradientStart:
    if output.grad_fn is None:
        return output
    if isinstance(output.grad_fn, BackwardCFunction):
        # In PyTorch 2.6 the graph of a Function is freed with its output, unless another node leads to it.
        with torch.enable_grad():
            output = output.view_as(output)
    return GradientEdge(output.grad_fn, output.output_nr)


def gradients(
    ends: Sequence[GradientStart], inputs: Streams, grads: Gradients, retain_graph: bool = False
) -> Gradients:
    """The gradients of `inputs`; None for an input that requires none, or on which the ends do not depend.

    This is torch.autograd.grad without its checks of the arguments, which double its time for small conditioners.
    """
    wanted = tuple([i for i in inputs if i.requires_grad])
    known = [(e, g) for e, g in zip(ends, grads, strict=True) if e is not None and g is not None]
    if not known or not wanted:
        return (None,) * len(inputs)
    with_hooks = [hooks for t in wanted if (hooks := t._backward_hooks)]
    if with_hooks:
        _keep_quiet_in_rewinds(with_hooks)
        _thread.in_rewind = True
    try:
        found: Gradients = run_backward(
            tuple([e for e, _ in known]),
            tuple([g for _, g in known]),
            retain_graph,
            False,  # create_graph
            wanted,
            allow_unreachable=True,
            accumulate_grad=False,
        )
    finally:
        if with_hooks:
            _thread.in_rewind = False
    if len(wanted) == len(inputs):
        return found
    rest = iter(found)
    return [next(rest) if i.requires_grad else None for i in inputs]
