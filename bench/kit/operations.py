"""A count of the operators that a training step runs, including recomputation and the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: aten._scaled_dot_product_flash_attention_backward,
}
"""PyTorch's table of operations lacks the operators of attention on the CPU. They perform as many as those of a GPU."""
PRODUCTS = ("mm", "addmm", "bmm")


class Operations(NamedTuple):
    """The counts of one step."""

    convolutions: int
    """Evaluations; a convolution's backward pass does not count."""
    products: int
    """Matrix products, with those of backward passes."""
    flops: int
    """Floating-point operations of convolutions, matrix products and attention."""
    operators: int
    """All operators, except views."""


def counted(step: Callable[[], object]) -> Operations:
    """The operators that `step` runs. Compiled code must not be part of it."""
    with _Counter() as counter:
        step()
    products = sum([counter.calls.get(name, 0) for name in PRODUCTS])
    return Operations(counter.calls.get("convolution", 0), products, counter.flops, sum(counter.calls.values()))


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: dict[str, int] = {}
        """By name of the operator."""
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        result = func(*args, **given)
        packet = func.overloadpacket
        formula = flop_registry.get(ATTENTION.get(packet, packet))
        if formula is not None:
            self.flops += int(formula(*args, **given, out_val=result))
        if not (func.is_view or packet in (aten.detach, aten.alias, aten._unsafe_view)):
            name = packet.__name__
            self.calls[name] = self.calls.get(name, 0) + 1
        return result
