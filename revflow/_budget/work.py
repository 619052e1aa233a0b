"""The work of operators, by count and never by the clock, so that the same training always gets the same plan."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from revflow._base.torch_private import TorchDispatchMode, pytree

OPERATIONS_PER_BYTE = 16
"""Floating-point operations that take as long as moving one byte. From 5 on a CPU to 100 on a GPU with tensor cores; it only has
to rank elementwise operators, which move bytes, below convolutions and matrix products, which compute."""


class WorkCounter(TorchDispatchMode):
    """Counts the work of all operators that run within this context."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        made = _nbytes(result)
        if made and not _is_view(func):
            self.work += OPERATIONS_PER_BYTE * (made + _nbytes((args, kwargs)))
            operations = flop_registry.get(func._overloadpacket)
            if operations is not None:
                self.work += operations(*args, **kwargs, out_val=result)
        return result


def _nbytes(tree: object) -> int:
    return sum([t.nbytes for t in pytree.tree_leaves(tree) if isinstance(t, Tensor) and t.layout == torch.strided])


def _is_view(operator: Any) -> bool:
    """Whether it moves no bytes: its result shares the memory of an argument, which it does not change."""
    returned = operator._schema.returns
    return bool(returned) and all(r.alias_info is not None and not r.alias_info.is_write for r in returned)
