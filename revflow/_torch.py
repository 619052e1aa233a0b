"""What PyTorch's releases since 2.6 name differently, and what they have under no public name."""

from __future__ import annotations

import torch
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

# PyTorch 2.6 cannot tell: there, export under no_grad.
is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)

_count_holders = getattr(torch._C, "_storage_Use_Count", None)


def holders(storage: torch.UntypedStorage) -> int | None:
    """How many tensors and storages refer to these bytes; None in old CPU builds of PyTorch, 2.6's among them."""
    return None if _count_holders is None else _count_holders(storage._cdata)


def has_global_hook() -> bool:
    """Whether a hook has been registered that every module calls."""
    return bool(
        _global_backward_pre_hooks or _global_backward_hooks or _global_forward_pre_hooks or _global_forward_hooks
    )


def allow_recompilations(count: int) -> None:
    """Raise dynamo's limit (8 for a function) to `count`; at the limit PyTorch goes on uncompiled."""
    config = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # its name in PyTorch 2.6
    setattr(config, limit, max(getattr(config, limit), count))
