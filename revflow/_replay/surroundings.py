"""Settings of the process that decide what an evaluation computes: autocast, the default dtype, attention kernels, caches.

A training loop may change them between a forward pass and its backward pass: the context around the forward pass has ended.
So the first evaluation notes them, and the second one runs with the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.backends import cuda, mha

from revflow._base.torch_private import is_any_autocast, parametrization_cache, set_parametrization_cache

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

    Older versions of PyTorch (2.13 does not) take a weight that was cast and cached without a graph from the cache in
    ordinary autograd later in the same context, and leave it untrained. And a rerun's casts would stay in the cache for
    no use.
    """
    with ExitStack() as stack:
        for kind, enabled, dtype in state or _switched_off(autocast_state(device)):
            stack.enter_context(torch.autocast(kind, enabled=enabled, dtype=dtype, cache_enabled=False))
        yield


def _switched_off(state: AutocastState) -> AutocastState:
    return [(kind, False, dtype) for kind, _, dtype in state]


Surroundings = tuple[torch.dtype, bool, bool, bool, bool]
"""What PyTorch's own layers of `known.KNOWN` do not depend on, and other modules may: the default dtype, and which kernels for
attention are enabled (`torch.nn.attention.sdpa_kernel`)."""


def surroundings() -> Surroundings:
    """Those of now."""
    flash, efficient, math, cudnn = _KERNELS
    return torch.get_default_dtype(), flash[0](), efficient[0](), math[0](), cudnn[0]()


class Within:
    """The surroundings of an evaluation, and without what a conditioner's two evaluations would not have alike.

    - Attention's fast path in eval mode: it runs only if gradients are off, and treats padding differently.
    - The cache of `parametrize.cached()`: the second evaluation would get the first one's weights, which have no graph.
    """

    def __init__(self, given: Surroundings) -> None:
        self._given = given

    def __enter__(self) -> None:
        self._outer, self._fast_path = surroundings(), mha.get_fastpath_enabled()
        self._cache = parametrization_cache()
        self._set(self._given, False, {})

    def __exit__(self, *_: object) -> None:
        self._set(self._outer, self._fast_path, self._cache)

    def _set(self, given: Surroundings, fast_path: bool, cache: dict[Any, Any]) -> None:
        if given != self._outer or given != self._given:
            torch.set_default_dtype(given[0])
            for (_, enable), enabled in zip(_KERNELS, given[1:], strict=True):
                enable(enabled)
        mha.set_fastpath_enabled(fast_path)
        set_parametrization_cache(cache)


_KERNELS: tuple[tuple[Callable[[], bool], Callable[[bool], None]], ...] = (
    (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
    (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
    (cuda.math_sdp_enabled, cuda.enable_math_sdp),
    (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
)
