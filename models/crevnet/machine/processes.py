"""Training in several processes, one a device: which one this is, and which one says what has ended them.

Either torchrun has started them, or Lightning starts them from the first one.
"""

from __future__ import annotations

import os

import torch.distributed as dist

from crevnet.settings import TrainingSettings


def place() -> tuple[int, int]:
    """This process's rank, and how many processes train together."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def go_alone() -> None:
    """End what processes have trained together: from here on each is by itself, with all windows."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def launched(training: TrainingSettings) -> tuple[int, int]:
    """How many devices to train on in each machine, and how many machines: torchrun's numbers where it has started this
    process, else those of the settings."""
    if dist.is_available() and dist.is_torchelastic_launched():
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        return devices, int(os.environ["WORLD_SIZE"]) // devices
    return training.devices, training.nodes


def is_first() -> bool:
    """Whether no other process of this command speaks for it: before they have met, by what started them."""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"


def is_first_to_fail() -> bool:
    """Whether this process is the one that says why all of them end: the others' errors follow from its."""
    if place()[1] == 1:
        return is_first()
    try:
        return bool(dist.distributed_c10d._get_default_store().add("crevnet: failed", 1) == 1)
    except RuntimeError:  # the first process, which keeps the count, has gone: because it failed
        return False
