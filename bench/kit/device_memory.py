"""Memory of a CUDA device: a cap for this process, a fresh start for each measurement, and the errors of running out."""

from __future__ import annotations

import gc

import torch

OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED", "unable to find an engine")
"""Parts of messages. cuDNN skips engines whose workspace it cannot get. If none is left, it raises the last of these."""


def free() -> None:
    """Free the memory of earlier steps. Networks whose methods were replaced are cycles, which only gc finds."""
    gc.collect()
    torch.cuda.empty_cache()


def cap(device: torch.device, limit: float) -> None:
    """Limit this process to `limit` bytes of the device."""
    free()
    total = torch.cuda.get_device_properties(device).total_memory
    index = torch.cuda.current_device() if device.index is None else device.index  # "cuda" by itself is refused
    torch.cuda.set_per_process_memory_fraction(min(limit / total, 1.0), index)


def ran_out(error: BaseException | None) -> bool:
    """Whether the error, or one that it follows from, is a lack of memory."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        if isinstance(error, RuntimeError) and any(part in str(error) for part in OUT_OF_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False
