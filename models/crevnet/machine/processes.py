"""Training in several processes, one per device: the rank of this one, and the one that reports an error.

Either torchrun has started them, or Lightning starts them from the first one.
"""

from __future__ import annotations

import os
import sys
from typing import Any


def place() -> tuple[int, int]:
    """The rank of this process, and the number of processes that train together."""
    dist = _group()
    return (0, 1) if dist is None else (dist.get_rank(), dist.get_world_size())


def go_alone() -> None:
    """End the process group: from here on, each process is on its own and reads all windows."""
    dist = _group()
    if dist is not None:
        dist.destroy_process_group()


def launched(devices: int, nodes: int) -> tuple[int, int]:
    """The number of devices per machine and the number of machines: those of torchrun if it has started this process, else those
    of the settings."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_torchelastic_launched():
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        return devices, int(os.environ["WORLD_SIZE"]) // devices
    return devices, nodes


def is_first() -> bool:
    """Whether this process prints for all processes of the command. The launcher's variables decide, so no group is needed."""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"


def is_first_to_fail() -> bool:
    """Whether this process reports why all of them end, because the errors of the others follow from its error."""
    dist = _group()
    if dist is None or dist.get_world_size() == 1:
        return is_first()
    try:
        return bool(dist.distributed_c10d._get_default_store().add("crevnet: failed", 1) == 1)
    except RuntimeError:  # the first process, which holds the count, has failed and ended
        return False


def _group() -> Any:
    """torch.distributed if it has a process group. None also if it is not imported, which would take a second."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None
