"""Free memory of a device."""

from __future__ import annotations

from pathlib import Path

import torch


def free_memory(device: torch.device | str) -> int:
    """Return the number of bytes that this process can still allocate on a device.

    This includes memory in the cache of PyTorch's CUDA allocator. Limits of the process or of its container also count.

    Args:
        device: A CUDA device, or on Linux the CPU.

    Raises:
        RuntimeError: If the free memory of the device cannot be determined.

    Examples:
        >>> revflow.free_memory("cpu") > 2**20
        True
    """
    device = torch.device(device)
    if device.type == "cuda" and torch.cuda.is_available():
        # Memory that PyTorch's allocator holds in its cache is free for this process.
        allocated = torch.cuda.memory_allocated(device)
        cached = torch.cuda.memory_reserved(device) - allocated
        free, total = torch.cuda.mem_get_info(device)
        return int(min(free + cached, _fraction(device) * total - allocated))
    if device.type == "cpu":
        try:
            return int(min(_available(), _left_in_container()))
        except OSError:
            pass
    raise RuntimeError(
        f"memory_budget is a share of the free memory, which cannot be determined for the device {device} on this system: "
        f"give bytes. Shares require a CUDA device, or the CPU on Linux"
    )


def _fraction(device: torch.device) -> float:
    """The share of a GPU's memory to which `torch.cuda.set_per_process_memory_fraction` limits this process."""
    get = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # older versions of PyTorch lack it
    return 1.0 if get is None else float(get(device))


def _available() -> int:
    """Bytes that Linux estimates to be available to new allocations."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def _left_in_container() -> float:
    """Bytes below the memory limit of the control group (version 2); infinite if there is no limit.

    Pages of files that were read some time ago count as used, but Linux frees them when memory is needed.
    """
    try:
        limit, used, pages = (
            Path(f"/sys/fs/cgroup/memory.{name}").read_text(encoding="ascii") for name in ("max", "current", "stat")
        )
    except OSError:
        return float("inf")
    if limit.strip() == "max":
        return float("inf")
    reclaimable = sum(int(line.split()[1]) for line in pages.splitlines() if line.startswith("inactive_file "))
    return int(limit) - int(used) + reclaimable
