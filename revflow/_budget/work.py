"""The work of a block's forward pass: operations and memory traffic, counted and not timed, so that equal runs agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.flop_counter import flop_registry

from revflow._base.torch_private import TorchDispatchMode, packet_of, pytree

OPERATIONS_PER_BYTE = 16
"""The floating-point operations that count as much as one byte of memory traffic.

A device computes 10 to 100 operations in the time in which it moves one byte: CPUs and GPUs in float32 about 10 to 20, and GPUs
with matrix units up to 100 or more. The value is at the lower end, so that elementwise operations are not overrated.
"""

_ATTENTION_ON_CPU = "aten::_scaled_dot_product_flash_attention_for_cpu"
"""PyTorch counts this kernel's operations only on a GPU, where it takes the same arguments."""
_ATTENTION = next(
    (packet for packet in flop_registry if str(packet) == "aten._scaled_dot_product_flash_attention"), None
)

_NOT_VIEWS_BY_SCHEMA = ("aten::_unsafe_view", "aten::alias", "aten::detach")


class Work(TorchDispatchMode):
    """A mode that adds up the work of all operations in `total`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        result = func(*args, **given)
        # A view moves nothing.
        if not (func.is_view or func.name() in _NOT_VIEWS_BY_SCHEMA):
            packet = _ATTENTION if func.name() == _ATTENTION_ON_CPU else packet_of(func)
            operations: Callable[..., int] | None = flop_registry.get(packet)
            self.total += 0 if operations is None else int(operations(*args, **given, out_val=result))
            self.total += OPERATIONS_PER_BYTE * sum(
                t.nbytes for t in pytree.tree_leaves((args, given, result)) if isinstance(t, Tensor)
            )
        return result
