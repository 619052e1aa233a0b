"""Tensors that leave a conditioner by another way than its result: a forward hook, a closure or a global list keeps them.

Under standard autograd a loss may be computed from them. Here those of the first evaluation have no graph, and those of the
second one come too late: such a loss would train nothing.
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


class Remembered:
    """What first evaluations have made of tensors that need gradients, and what is still held of that.

    Without the engine these tensors would have a graph. If a second evaluation reads one, from a global cache, say, no
    gradient passes through it.
    """

    def __init__(self) -> None:
        self._made: dict[int, tuple[ref[Tensor], str]] = {}

    def note(self, tensor: Tensor, function: str) -> None:
        number, made = id(tensor), self._made
        made[number] = ref(tensor, lambda _: made.pop(number, None)), function

    def maker(self, tensor: Tensor) -> str | None:
        """The function that made it, if a first evaluation called that."""
        reference, function = self._made.get(id(tensor), _NOBODY)
        return function if reference() is tensor else None


class Remembering(TorchFunctionMode):
    """Notes what a first evaluation makes."""

    def __init__(self, remembered: Remembered) -> None:
        super().__init__()
        self._remembered = remembered
        self._within_no_grad = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.compiler.is_compiling():
            return func(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if func is set_grad_enabled:
            # Gradients are off in a first evaluation. So `no_grad` switches them off twice: where it begins, and where it ends.
            self._within_no_grad = not (args[0] or self._within_no_grad)
        elif not self._within_no_grad and func not in _DETACHING:
            given = _tensors((*args, *(kwargs or {}).values()))
            if any([t.requires_grad or self._remembered.maker(t) for t in given]):
                for tensor in _tensors((result,)):
                    if not tensor.requires_grad and (tensor.is_floating_point() or tensor.is_complex()):
                        self._remembered.note(tensor, _name(func))
        return result


class Made(TorchFunctionMode):
    """Notes what a second evaluation makes, so that one can see later what is still held; and what it reads of that which a
    first one has made."""

    def __init__(self, remembered: Remembered) -> None:
        super().__init__()
        self._remembered = remembered
        self._made: list[tuple[ref[Tensor], str]] = []
        self.read: tuple[tuple[int, ...], str] | None = None
        """The shape of a tensor that a first evaluation has made, and the function that made it."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.compiler.is_compiling():
            return func(*args, **(kwargs or {}))
        for tensor in _tensors((*args, *(kwargs or {}).values())):
            if isinstance(tensor.grad_fn, BackwardCFunction):  # of a Function of the user's own, which no mode sees
                self._made.append((ref(tensor), type(tensor.grad_fn).__name__))
            elif not tensor.requires_grad and torch.is_grad_enabled() and func not in _DETACHING:
                maker = self._remembered.maker(tensor)
                if maker is not None:
                    self.read = tuple(tensor.shape), maker
        result = func(*args, **(kwargs or {}))
        self._made += [(ref(t), _name(func)) for t in _tensors((result,)) if t.grad_fn is not None]
        return result

    def held(self) -> tuple[Tensor, str] | None:
        """A tensor that is still there, and the function that made it. To be called when the evaluation's graph is gone."""
        for tensor, function in self._made:
            found = tensor()
            if found is not None:
                return found, function
        return None


_NOBODY = (lambda: None), ""
_DETACHING = frozenset((Tensor.detach, Tensor.detach_, Tensor.data.__get__, Tensor.requires_grad_))  # type: ignore[attr-defined]


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Those among the values, and in the lists and tuples among them."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += [v for v in value if isinstance(v, Tensor)]
    return found


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", "an operation")


def refuse_escapes(place: str, followed: Made | None, attributes: Sequence[str]) -> None:
    """Refuse what has left an evaluation: tensors in `attributes`, or some of those that it made."""
    if attributes:
        raise RuntimeError(
            f"{place} leaves a tensor that needs a gradient in the attribute {', '.join(attributes)}. {_ESCAPES}"
        )
    if followed is not None and followed.read is not None:
        shape, function = followed.read
        raise RuntimeError(
            f"{place} reads a tensor of shape {shape} (by {function}) that a first evaluation has made and "
            f"kept outside of its own attributes: in a global cache, say. That one ran without a graph, so the gradient would "
            f"lack what passes through it. Compute it in each evaluation, or keep it without a graph: `.detach()`"
        )
    found = None if followed is None else followed.held()
    if found is not None:
        tensor, function = found
        raise RuntimeError(
            f"{place} makes a tensor of shape {tuple(tensor.shape)} (by {function}) that is still held, by a forward hook or a "
            f"list, say. {_ESCAPES}"
        )


_ESCAPES = (
    "A loss that is computed from it gives no gradient, since the forward pass ran without a graph. Let it leave through a "
    "stream of its own (docs/blocks.md, auxiliary losses), or keep it without a graph: `.detach()`"
)
