"""The amount of memory that activations may take, as a share of the memory that is free before training."""

from __future__ import annotations

import os
from collections.abc import Container, Iterable

import torch.distributed as dist
from torch import Tensor

import revflow
from crevnet.networks.config import MemoryBudget

_AUTO = {"cuda": 0.8, "cpu": 0.5}
"""The share for "auto", by kind of device. The rest is for frames, workspaces and fragmentation, and on a CPU for the system."""


def is_amount(given: MemoryBudget) -> bool:
    """Whether a memory budget does not depend on the free memory."""
    return given != "auto" and not isinstance(given, float)


def amount(
    given: MemoryBudget, parameters: Iterable[Tensor], trained: Container[Tensor] = (), processes: int | None = None
) -> int:
    """The bytes for "auto" or a share; 0 if the free memory cannot be determined or leaves no room.

    For the other arguments, see `room`.
    """
    parameters = list(parameters)
    share = given if isinstance(given, float) else _AUTO.get(parameters[0].device.type, 0.5)
    return int(share * room(parameters, trained, processes))


def budget_of(given: MemoryBudget, count: int) -> revflow.Budget:
    """The budget of so many bytes, which "auto" or a share amounts to."""
    # "auto" is a share with a reserve, which a step that recomputes everything may use.
    return revflow.Budget(count or "min", warn=given != "auto")


def room(parameters: Iterable[Tensor], trained: Container[Tensor] = (), processes: int | None = None) -> int:
    """The bytes that activations can take at most: the free memory without the parameters' gradients and Adam's state.

    Processes on the same machine share the memory of the CPU. On GPUs, each process has a device of its own. The result is 0 if
    the free memory cannot be determined.

    Args:
        parameters: the parameters of the network.
        trained: those for which Adam's state already exists.
        processes: number of processes on this machine, by default that of the launcher.
    """
    parameters = list(parameters)
    device = parameters[0].device
    try:
        free = revflow.free_memory(device)
    except RuntimeError:
        return 0
    if device.type == "cpu":
        free //= processes or _processes()
    coming = sum(p.nbytes * ((p.grad is None) + 2 * (p not in trained)) for p in parameters if p.requires_grad)
    return max(free - coming, 0)


def _processes() -> int:
    """The number of processes that train together: on this machine if torchrun has started them, else on all machines."""
    everywhere = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    return int(os.environ.get("LOCAL_WORLD_SIZE", everywhere))
