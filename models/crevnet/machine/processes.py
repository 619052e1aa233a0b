"""Training in several processes, one per device: this process's rank, and the process that reports a failure.

Either torchrun starts the processes, or Lightning starts them from the first one.
"""

from __future__ import annotations

import os
import sys
from typing import Any


def place() -> tuple[int, int]:
    """This process's rank, and the number of processes that train together."""
    dist = _group()
    return (0, 1) if dist is None else (dist.get_rank(), dist.get_world_size())


def go_alone() -> None:
    """End the process group after training together: from here on each process is independent and has all windows."""
    dist = _group()
    if dist is not None:
        dist.destroy_process_group()


def launched(devices: int, nodes: int) -> tuple[int, int]:
    """The number of devices per machine, and of machines: torchrun's if it started this process, else the arguments."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_torchelastic_launched():
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        return devices, int(os.environ["WORLD_SIZE"]) // devices
    return devices, nodes


def is_first() -> bool:
    """Whether this process prints the command's output. Before the processes connect, their launcher's rank decides."""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"


def is_first_to_fail() -> bool:
    """Whether this process failed first and therefore reports the failure; the others' errors are consequences."""
    dist = _group()
    if dist is None or dist.get_world_size() == 1:
        return is_first()
    try:
        return bool(dist.distributed_c10d._get_default_store().add("crevnet: failed", 1) == 1)
    except RuntimeError:  # the first process, which stores the count, has already failed
        return False


def _group() -> Any:
    """torch.distributed if a process group exists, else None. It is not imported here, which would take a second."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None
