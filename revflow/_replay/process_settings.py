"""Settings of the process that determine what an evaluation computes: the default dtype and the kernels for attention.

A training loop may set them by a context around the forward pass, which has ended when the backward pass begins. So the first
evaluation records them, and the second one runs with the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.backends import cuda, mha

from revflow._base.torch_private import parametrization_cache, set_parametrization_cache

ProcessSettings = tuple[torch.dtype, bool, bool, bool, bool]
"""The default dtype, and which kernels for attention are enabled (`torch.nn.attention.sdpa_kernel`).

PyTorch's own layers in `known.KNOWN` do not depend on them. Other modules may.
"""


def process_settings() -> ProcessSettings:
    """The current settings."""
    flash, efficient, math, cudnn = _KERNELS
    return torch.get_default_dtype(), flash[0](), efficient[0](), math[0](), cudnn[0]()


class EvaluationContext:
    """A context with the given settings for an evaluation, and without two mechanisms that the two evaluations would not share.

    - Attention's fast path in eval mode runs only if gradients are off, and treats padding differently. So only the first
      evaluation would take it.
    - The cache of `parametrize.cached()` would give the first evaluation's weights to the second one. Those have no graph.
    """

    def __init__(self, given: ProcessSettings) -> None:
        self._given = given

    def __enter__(self) -> None:
        self._outer, self._fast_path = process_settings(), mha.get_fastpath_enabled()
        self._cache = parametrization_cache()
        self._differ = self._given != self._outer
        self._set(self._given, False, {})

    def __exit__(self, *_: object) -> None:
        self._set(self._outer, self._fast_path, self._cache)

    def _set(self, settings: ProcessSettings, fast_path: bool, cache: dict[Any, Any]) -> None:
        if self._differ:
            torch.set_default_dtype(settings[0])
            for (_, enable), enabled in zip(_KERNELS, settings[1:], strict=True):
                enable(enabled)
        mha.set_fastpath_enabled(fast_path)
        set_parametrization_cache(cache)


_KERNELS: tuple[tuple[Callable[[], bool], Callable[[bool], None]], ...] = (
    (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
    (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
    (cuda.math_sdp_enabled, cuda.enable_math_sdp),
    (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
)
"""For each kernel: whether it is enabled, and a function that enables or disables it."""
