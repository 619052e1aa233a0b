"""A count of the operations that a training step runs, including recomputation and the backward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

PRODUCTS = "mm", "addmm", "bmm"

ON_CPU = "_for_cpu"
"""Part of the name of attention's kernels on a CPU. PyTorch counts only those of GPUs, which have the same arguments."""


class Operations(NamedTuple):
    """The counts of one step."""

    convolutions: int
    """Evaluations; a convolution's backward pass does not count."""
    products: int
    """Matrix products, with those of backward passes."""
    flops: int
    """Floating-point operations of both, of attention, and of backward passes."""
    calls: int
    """All operators that ran, views and copies included."""


def counted(step: Callable[[], object]) -> Operations:
    """The operations that `step` runs. Compiled code must not be part of it."""
    with _Counter() as counter:
        step()
    calls = counter.calls
    return Operations(calls["convolution"], sum(calls[name] for name in PRODUCTS), counter.flops, calls.total())


class _Counter(TorchDispatchMode):
    """Counts operators. PyTorch's FlopCounterMode also registers module hooks, under which some libraries fail."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        namespace, _, name = func.name().partition("::")
        name = name.partition(".")[0]
        self.calls[name] += 1
        formula = flop_registry.get(getattr(getattr(torch.ops, namespace), name.replace(ON_CPU, "")))
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result
