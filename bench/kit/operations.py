"""A count of the operations that a training step runs, including recomputation and the backward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten
COUNTED = {"convolution": aten.convolution, "mm": aten.mm, "addmm": aten.addmm, "bmm": aten.bmm}


class Operations(NamedTuple):
    """The counts of one step."""

    convolutions: int
    """Evaluations; a convolution's backward pass does not count."""
    products: int
    """Matrix products, with those of backward passes."""
    flops: int
    """Floating-point operations of both, and of backward passes. PyTorch does not count those of attention on a CPU."""


def counted(step: Callable[[], object]) -> Operations:
    """The operations that `step` runs. Compiled code must not be part of it."""
    calls: Counter[str] = Counter()

    def call(name: str, *shapes: Any, **options: Any) -> int:
        calls[name] += 1
        return 0

    formulas = {packet: partial(call, name) for name, packet in COUNTED.items()}
    with FlopCounterMode(display=False) as total, FlopCounterMode(display=False, custom_mapping=formulas):
        step()
    products = calls["mm"] + calls["addmm"] + calls["bmm"]
    return Operations(calls["convolution"], products, total.get_total_flops())
