"""Tensors that leave a conditioner by another way than its result, for example through a forward hook, a closure or a cache.

Under standard autograd, a loss can be computed from such a tensor. With the engine, such a loss would train nothing. The tensors
of a first evaluation have no graph, and those of a second one exist only in the backward pass.

Two modes of PyTorch's `__torch_function__` record tensors while a conditioner runs: `FirstRecorder` those of first evaluations,
`SecondRecorder` those of one second evaluation. This is slow, so that the guard does it rarely (`close_looks`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode

from revflow._base.torch_private import set_grad_enabled


class FirstTensors:
    """The tensors that first evaluations computed from tensors that need gradients, as far as they still exist.

    Under standard autograd these tensors would have a graph. If a second evaluation reads one, for example from a global cache,
    no gradient passes through it.
    """

    def __init__(self) -> None:
        self._made: dict[int, tuple[ref[Tensor], str]] = {}

    def record(self, tensor: Tensor, function: str) -> None:
        """Store a weak reference to the tensor, until it is freed, and the function that computed it."""
        number, made = id(tensor), self._made
        made[number] = ref(tensor, lambda _: made.pop(number, None)), function

    def maker(self, tensor: Tensor) -> str | None:
        """The name of the function that computed the tensor in a first evaluation; None if no first evaluation did."""
        reference, function = self._made.get(id(tensor), _UNKNOWN)
        return function if reference() is tensor else None


class FirstRecorder(TorchFunctionMode):
    """A mode that records the tensors of a first evaluation."""

    def __init__(self, tensors: FirstTensors) -> None:
        super().__init__()
        self._first = tensors
        self._within_no_grad = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.compiler.is_compiling():
            return func(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if func is set_grad_enabled:
            # Gradients are off in a first evaluation. So a `no_grad` within it switches them off twice: at its beginning, and
            # at its end, when it restores the state before. Every second call therefore ends a `no_grad`.
            self._within_no_grad = not (args[0] or self._within_no_grad)
        elif not self._within_no_grad and func not in _DETACHING:
            given = _tensors((*args, *(kwargs or {}).values()))
            if any([t.requires_grad or self._first.maker(t) for t in given]):
                for tensor in _tensors((result,)):
                    if not tensor.requires_grad and (tensor.is_floating_point() or tensor.is_complex()):
                        self._first.record(tensor, _name(func))
        return result


class SecondRecorder(TorchFunctionMode):
    """A mode that records the tensors of a second evaluation, and which tensors of a first one it reads.

    When the evaluation's graph is freed, a tensor that still exists has left the conditioner: `held` returns it.
    """

    def __init__(self, tensors: FirstTensors) -> None:
        super().__init__()
        self._first = tensors
        self._made: list[tuple[ref[Tensor], str]] = []
        self.read: tuple[tuple[int, ...], str] | None = None
        """The shape of a tensor that was read, and the function of a first evaluation that computed it."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.compiler.is_compiling():
            return func(*args, **(kwargs or {}))
        for tensor in _tensors((*args, *(kwargs or {}).values())):
            if isinstance(tensor.grad_fn, BackwardCFunction):  # the result of a user's Function, which bypasses modes
                self._made.append((ref(tensor), type(tensor.grad_fn).__name__))
            elif not tensor.requires_grad and torch.is_grad_enabled() and func not in _DETACHING:
                maker = self._first.maker(tensor)
                if maker is not None:
                    self.read = tuple(tensor.shape), maker
        result = func(*args, **(kwargs or {}))
        self._made += [(ref(t), _name(func)) for t in _tensors((result,)) if t.grad_fn is not None]
        return result

    def held(self) -> tuple[Tensor, str] | None:
        """A tensor that still exists, and the function that computed it. To be called after the evaluation's graph is freed."""
        for tensor, function in self._made:
            found = tensor()
            if found is not None:
                return found, function
        return None


_UNKNOWN = (lambda: None), ""
_DETACHING = frozenset((Tensor.detach, Tensor.detach_, Tensor.data.__get__, Tensor.requires_grad_))  # type: ignore[attr-defined]


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among the values, and in the lists and tuples among them."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += [v for v in value if isinstance(v, Tensor)]
    return found


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", "an operation")


def refuse_escapes(place: str, followed: SecondRecorder | None, attributes: Sequence[str]) -> None:
    """Refuse tensors that left an evaluation: those in `attributes`, and those that `followed` recorded."""
    if attributes:
        raise RuntimeError(
            f"{place} stores a tensor that needs a gradient in the attribute {', '.join(attributes)}. {_ESCAPES}"
        )
    if followed is not None and followed.read is not None:
        shape, function = followed.read
        raise RuntimeError(
            f"{place} reads a tensor of shape {shape} (by {function}) that a first evaluation computed and stored outside of "
            f"the module's attributes, for example in a global cache. It has no graph, so the gradient that passes through it "
            f"would be missing. Compute it in each evaluation, or store it without a graph: `.detach()`"
        )
    found = None if followed is None else followed.held()
    if found is not None:
        tensor, function = found
        raise RuntimeError(
            f"{place} computes a tensor of shape {tuple(tensor.shape)} (by {function}) that is still held after its evaluation, "
            f"for example by a forward hook or a list. {_ESCAPES}"
        )


_ESCAPES = (
    "A loss that is computed from it gives no gradient, since the forward pass ran without a graph. Return it through a "
    "stream of its own (docs/blocks.md, auxiliary losses), or store it without a graph: `.detach()`"
)
