"""Free memory of a device."""

from __future__ import annotations

from pathlib import Path

import torch


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate; RuntimeError if that cannot be determined."""
    if device.type == "cuda":
        # Memory that PyTorch's allocator holds in its cache is free for this process.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    if device.type == "cpu":
        try:
            return int(min(_available(), _left_in_container()))
        except OSError:
            pass
    raise RuntimeError(
        f"memory_budget is a share of the free memory, which cannot be determined for the device {device} on this system: "
        f"give bytes. Shares work for CUDA devices, and on Linux for the CPU"
    )


def _available() -> int:
    """Bytes that Linux estimates to be available to new allocations."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def _left_in_container() -> float:
    """Bytes below the memory limit of the control group (version 2); infinite if there is no limit."""
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text(encoding="ascii") for name in ("max", "current"))
    except OSError:
        return float("inf")
    return float("inf") if limit.strip() == "max" else int(limit) - int(used)
