"""Modules and changes that a second evaluation could not repeat."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch import Tensor, nn


def refuse_moved(frozen: Sequence[tuple[Tensor, int]]) -> None:
    """A codebook that follows the data, say: it would move twice, and the second evaluation would see another one."""
    for parameter, version in frozen:
        if parameter._version != version:
            raise RuntimeError(
                f"it changes a frozen parameter of shape {tuple(parameter.shape)} in place, so the second evaluation would start "
                f"from other values: make it a buffer, by register_buffer"
            )


def refuse_sharded(module: nn.Module) -> None:
    """FSDP gathers a module's parameters when it is called: after the engine has taken those that the module held."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported here: that takes long
    if fsdp is None or not isinstance(module, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)):
        return
    if next(module.parameters(), None) is not None:
        raise RuntimeError(
            f"fully_shard was called on a {type(module).__name__} that the engine runs by itself: its parameters would get no "
            f"gradient. Call fully_shard on the sequence, on what holds it or the recurrence, or on a coupling as a whole"
        )


LAZY = (
    "a {} has not seen an input yet, and so has no parameters that could be trained: call the network once within "
    "`with torch.no_grad():`"
)
