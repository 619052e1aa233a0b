"""Autocast, as it was in the first evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from revflow._base.torch_private import is_any_autocast

AutocastState = list[tuple[str, bool, torch.dtype]]


def autocast_state(device: torch.device) -> AutocastState:
    """(device type, enabled, dtype) for the CPU and this device; empty if autocast is off on both."""
    if not is_any_autocast():
        return []
    kind = device.type
    on_device = kind not in ("cpu", "meta") and torch.is_autocast_enabled(kind)
    if not on_device and not torch.is_autocast_enabled("cpu"):
        return []
    kinds = ("cpu",) if kind in ("cpu", "meta") else ("cpu", kind)
    return [(k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds]


@contextmanager
def autocast(state: AutocastState, device: torch.device) -> Iterator[None]:
    """Autocast as in `state`, on the CPU and this device, with the cache of cast weights off.

    The first evaluation would cache weights that were cast without a graph. Standard autograd, later in the same context, would
    take these weights from the cache, and they would get no gradient. That is so in older releases of PyTorch, but not in 2.13.
    In addition, the casts of a second evaluation would stay in the cache without being used again.
    """
    with ExitStack() as stack:
        # An empty state means that autocast was off. It is then switched off here, since the backward pass may run within it.
        for kind, enabled, dtype in state or _switched_off(autocast_state(device)):
            stack.enter_context(torch.autocast(kind, enabled=enabled, dtype=dtype, cache_enabled=False))
        yield


def _switched_off(state: AutocastState) -> AutocastState:
    return [(kind, False, dtype) for kind, _, dtype in state]
