"""Tensors that leave a conditioner by another way than its result: a forward hook, a closure or a global list keeps them.

Under standard autograd a loss may be computed from them. Here those of the first evaluation have no graph, and those of the
second one come too late: such a loss would train nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import ref

from torch import Tensor
from torch.overrides import TorchFunctionMode


class Made(TorchFunctionMode):
    """Notes what an evaluation makes, so that one can see later what is still held."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[tuple[ref[Tensor], str]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                self._made.append((ref(tensor), getattr(func, "__name__", "an operation")))
        return result

    def held(self) -> tuple[Tensor, str] | None:
        """A tensor that is still there, and the function that made it. To be called when the evaluation's graph is gone."""
        for tensor, function in self._made:
            found = tensor()
            if found is not None:
                return found, function
        return None


def refuse_escapes(place: str, followed: Made | None, attributes: Sequence[str]) -> None:
    """Refuse what has left an evaluation: tensors in `attributes`, or some of those that it made."""
    if attributes:
        raise RuntimeError(
            f"{place} leaves a tensor that needs a gradient in the attribute {', '.join(attributes)}. {_ESCAPES}"
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
