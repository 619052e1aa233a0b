"""Training in several processes, one a device: which one this is, and which one says what has ended them.

Either torchrun has started them, or Lightning starts them from the first one.
"""

from __future__ import annotations

import os
import sys
from typing import Any


def place() -> tuple[int, int]:
    """This process's rank, and how many processes train together."""
    dist = _group()
    return (0, 1) if dist is None else (dist.get_rank(), dist.get_world_size())


def go_alone() -> None:
    """End what processes have trained together: from here on each is by itself, with all windows."""
    dist = _group()
    if dist is not None:
        dist.destroy_process_group()


def launched(devices: int, nodes: int) -> tuple[int, int]:
    """How many devices to train on in each machine, and how many machines: torchrun's numbers where it has started this
    process, else those of the settings."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_torchelastic_launched():
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        return devices, int(os.environ["WORLD_SIZE"]) // devices
    return devices, nodes


def is_first() -> bool:
    """Whether no other process of this command speaks for it: before they have met, by what started them."""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"


def is_first_to_fail() -> bool:
    """Whether this process is the one that says why all of them end: the others' errors follow from its."""
    dist = _group()
    if dist is None or dist.get_world_size() == 1:
        return is_first()
    try:
        return bool(dist.distributed_c10d._get_default_store().add("crevnet: failed", 1) == 1)
    except RuntimeError:  # the first process, which keeps the count, has gone: because it failed
        return False


def _group() -> Any:
    """torch.distributed if processes have met by it; None also if nothing has imported it yet, which would take a second."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None
