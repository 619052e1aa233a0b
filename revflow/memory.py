"""Peak memory of a training step, by one of three ways that are never mixed.

- **cuda**: the allocator's own counters of requested bytes.
- **tracked**: on the CPU, the bytes of every storage that an operator returned and that is still alive.
- **predicted**: the same count under fake tensors, which have shapes and no data: nothing is allocated, any size will do.

Tracked and predicted bytes agree exactly. All three count what operators return; the CPU ways do not see what an operator
allocates and frees within itself (a convolution's workspace), nor random states and Python objects.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from revflow._states import is_in_host_memory


@dataclass(frozen=True)
class MemoryReport:
    """Bytes beyond those that were alive before the step."""

    peak: int
    """The most that was alive at any one time."""
    kept: int
    """What is still alive when the step has returned, its result included: for a forward pass, what backward needs."""
    how: Literal["cuda", "tracked", "predicted"]

    def __str__(self) -> str:
        return f"peak {self.peak / 2**20:.1f} MiB, kept {self.kept / 2**20:.1f} MiB ({self.how})"


def measure_memory(
    step: Callable[[], object], *, device: torch.device | str = "cpu", predict: bool = False
) -> MemoryReport:
    """Run `step()` and measure what it allocates, in bytes beyond what was alive before.

    Args:
        step: the code to measure: a forward pass, a training step. What it returns counts as kept.
        device: where the step runs: a CUDA device for the allocator's counters, else the CPU.
        predict: run the step on fake tensors. Whatever it uses has to be made inside it, the model too: count its
            parameters in, or measure the two apart.
    """
    if predict:
        with FakeTensorMode():
            return _tracked(step, "predicted")
    if torch.device(device).type == "cuda":
        return _on_cuda(step, torch.device(device))
    if torch.device(device).type != "cpu":
        raise ValueError(f"measure_memory knows the CPU and CUDA devices, not {device}; use predict=True")
    return _tracked(step, "tracked")


def _on_cuda(step: Callable[[], object], device: torch.device) -> MemoryReport:
    def requested(what: str) -> int:
        return int(torch.cuda.memory_stats(device)[f"requested_bytes.all.{what}"])

    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = requested("current")
    result = step()
    torch.cuda.synchronize(device)
    report = MemoryReport(requested("peak") - before, requested("current") - before, "cuda")
    del result
    return report


def _tracked(step: Callable[[], object], how: Literal["tracked", "predicted"]) -> MemoryReport:
    with _LiveStorages() as live:
        result = step()
        report = MemoryReport(live.peak, live.now, how)
    del result
    return report


class _LiveStorages(TorchDispatchMode):
    """Counts the bytes of the storages that operators return, until each is freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Storages that the step was given are not its own, even where an operator returns a view of them. A constant that
        # torch.tensor has just made (Adam's step counts) first shows as what lift_fresh is given.
        given = set() if func is torch.ops.aten.lift_fresh.default else _storages((args, kwargs))
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf, given)
        return result

    def _count(self, tensor: Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        size = storage.nbytes()
        if key in self._sizes:
            self._add(size - self._sizes[key])  # an operator may resize what it was given
            self._sizes[key] = size
        elif key not in given and not is_in_host_memory():
            self._sizes[key] = size
            self._add(size)
            weakref.finalize(storage, self._free, key).atexit = False

    def _add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def _storages(tree: object) -> set[int]:
    return {t.untyped_storage()._cdata for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)}
