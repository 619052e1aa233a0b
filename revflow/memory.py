"""Peak memory of a training step, by one of three ways that are never mixed.

- **cuda**: the allocator's own counters of requested bytes.
- **tracked**: on the CPU, the bytes of every storage that an operator returned and that is still alive.
- **predicted**: the same count under fake tensors, which have shapes and no data: nothing is allocated, any size will do.

Tracked and predicted bytes agree exactly, but for the few values that the guard compares when a chain has been undone, which
fake tensors have none of. `predict_memory` predicts a step for all batch sizes at once. All three ways count what operators
return; the CPU ways do not see what an operator allocates and frees within itself (a convolution's workspace), nor random
states and Python objects.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from revflow._base.host_memory import is_in_host_memory
from revflow._base.torch_private import FakeTensor, FakeTensorMode, TorchDispatchMode


@dataclass(frozen=True)
class MemoryReport:
    """Bytes beyond those that were alive before the step.

    Examples:
        >>> weight = torch.ones(1024)
        >>> revflow.measure_memory(lambda: weight + 1).kept  # bytes of the sum
        4096
    """

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

    Raises TypeError for what cannot be called, and ValueError for a device that is neither the CPU nor CUDA, unless `predict`.

    Examples:
        >>> net = revflow.ReversibleSequence([revflow.AdditiveCoupling(torch.nn.Linear(64, 64)) for _ in range(8)])
        >>> x = torch.randn(256, 128)
        >>> report = revflow.measure_memory(lambda: net(x).sum().backward())
        >>> with revflow.ordinary_autograd():
        ...     stored = revflow.measure_memory(lambda: net(x).sum().backward())
        >>> report.peak < stored.peak
        True
    """
    if not callable(step):
        kind = type(step).__name__
        raise TypeError(
            f"measure_memory takes what it is to run, `lambda: net(x)` say; got a {kind}, which has run already"
        )
    if predict:
        with FakeTensorMode():
            return _tracked(step, "predicted")
    if torch.device(device).type == "cuda":
        return _on_cuda(step, torch.device(device))
    if torch.device(device).type != "cpu":
        raise ValueError(f"measure_memory knows the CPU and CUDA devices, not {device}; use predict=True")
    return _tracked(step, "tracked")


@dataclass(frozen=True)
class BatchMemory:
    """Predicted bytes of a step, by its batch size.

    Examples:
        >>> memory = revflow.predict_memory(lambda batch: torch.zeros(batch, 1024).sum())
        >>> memory.peak(200) > memory.peak(100)
        True
    """

    peaks: tuple[tuple[int, int], ...]
    """(fixed, of a sample) at each moment that is the peak for some batch sizes, those of the largest first."""

    def peak(self, batch: int) -> int:
        """The most that is alive at any one time."""
        return max(fixed + sample * batch for fixed, sample in self.peaks)

    def largest_batch(self, capacity: int) -> int:
        """The largest batch whose peak is at most `capacity` bytes; 0 if none is.

        A device needs more than the peak: for workspaces, the gaps of its allocator and, with CUDA, half a GiB of its own.

        Raises ValueError if no batch is too large, since nothing grows with it.
        """
        limits = [(capacity - fixed) // sample for fixed, sample in self.peaks if sample]
        if not limits:
            raise ValueError(
                "the step's memory does not grow with the batch: make its input of the batch that it is given"
            )
        return max(min(limits), 0) if self.peak(0) <= capacity else 0


def predict_memory(step: Callable[[int], object]) -> BatchMemory:
    """Predict what a step takes at every batch size, from one run of it on fake tensors.

        memory = revflow.predict_memory(training_step)  # training_step(batch) makes the model and its input
        memory.peak(8), memory.largest_batch(16 * 2**30)

    The run's batch is a prime number so large that a tensor's bytes are a multiple of it only where they grow with the batch.
    Equal to `measure_memory`'s peaks from a batch of 2 on. Parts of a single sample may be contiguous where those of several
    are not, and then be shared rather than copied, or copied rather than shared: a batch of 1 may differ by a few streams.

    Args:
        step: called with a batch size, it makes whatever it uses, the model too. Every tensor has to be of a size that is
            proportional to the batch or does not depend on it, and what is done must not depend on it: no loop over samples,
            no `memory_budget`.

    Examples:
        >>> def step(batch):
        ...     net = torch.nn.Linear(64, 64)
        ...     net(torch.randn(batch, 64)).sum().backward()
        >>> memory = revflow.predict_memory(step)
        >>> memory.peak(64) < memory.peak(128)
        True
        >>> memory.largest_batch(2**20) > 64
        True
    """
    live = _BatchStorages()
    with FakeTensorMode(), live:
        result = step(_MANY)
        del result
    return live.memory()


_MANY = 3_000_000_019


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
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[
                0
            ].fake_device  # autograd asks for it more often than for all else: this saves a fifth of the time
        # Storages that the step was given are not its own, even where an operator returns a view of them. A constant that
        # torch.tensor has just made (Adam's step counts) first shows as what lift_fresh is given.
        given = set() if func is torch.ops.aten.lift_fresh.default else _storages((args, kwargs))
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._count(tensor, given)
        return result

    def _count(self, tensor: Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        size = self._size(storage)
        if key in self._sizes:
            self._add(size - self._sizes[key])  # an operator may resize what it was given
            self._sizes[key] = size
        elif key not in given and not is_in_host_memory():
            self._sizes[key] = size
            self._add(size)
            weakref.finalize(storage, self._free, key).atexit = False

    def _size(self, storage: torch.UntypedStorage) -> int:
        return storage.nbytes()

    def _add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)

    def _free(self, key: int) -> None:
        self._add(-self._sizes.pop(key))


class _BatchStorages(_LiveStorages):
    """Counts fixed bytes, and those of a sample in units of `_SAMPLE`, and keeps all of the count's maxima."""

    def __init__(self) -> None:
        super().__init__()
        self._maxima = {0}
        self._rises = False

    def _size(self, storage: torch.UntypedStorage) -> int:
        size = storage.nbytes()
        return size if size % _MANY else size // _MANY * _SAMPLE

    def _add(self, size: int) -> None:
        if self._rises and size < 0:
            self._maxima.add(self.now)
        self._rises = size >= 0
        super()._add(size)

    def memory(self) -> BatchMemory:
        """The upper envelope of the maxima, which are lines over the batch size."""
        peaks: list[tuple[int, int]] = []
        for maximum in sorted(self._maxima | {self.now}, reverse=True):
            sample, fixed = divmod(maximum, _SAMPLE)
            if peaks and fixed <= peaks[-1][0]:
                continue
            while len(peaks) > 1 and _is_below(peaks[-2], peaks[-1], (fixed, sample)):
                peaks.pop()
            peaks.append((fixed, sample))
        return BatchMemory(tuple(peaks))


_SAMPLE = 2**60  # more than all fixed bytes


def _is_below(steep: tuple[int, int], middle: tuple[int, int], flat: tuple[int, int]) -> bool:
    """Whether `middle` is nowhere above both others."""
    # Where `flat` meets it does not lie before where `steep` does.
    return (flat[0] - middle[0]) * (steep[1] - middle[1]) >= (middle[0] - steep[0]) * (middle[1] - flat[1])


def _storages(tree: object) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in _tensors(tree)}


def _tensors(tree: object) -> Iterator[Tensor]:
    """Those among an operator's arguments or results."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list, dict)):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(branch)
