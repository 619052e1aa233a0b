"""Peak memory of a training step, by one of three methods that are never mixed.

- **cuda**: the counters of requested bytes of the CUDA allocator.
- **tracked**: on the CPU, the bytes of every storage that an operator returned and that is still alive.
- **predicted**: the same count under fake tensors, which have shapes and no data. Nothing is allocated, so any size is possible.

Tracked and predicted bytes agree exactly, except for the few values that the guard compares at the end of a backward pass: fake
tensors have none. `predict_memory` predicts a step for all batch sizes at once. All three methods count the results of
operators. The two for the CPU do not count memory that an operator allocates and frees internally (a convolution's workspace),
random states, or Python objects.
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
    """Memory used by a step, in bytes, in addition to the memory in use before the step.

    Examples:
        >>> weight = torch.ones(1024)
        >>> revflow.measure_memory(lambda: weight + 1).kept  # bytes of the sum
        4096
    """

    peak: int
    """Largest number of bytes in use at any one time."""
    kept: int
    """Number of bytes in use after the step, including its result.

    After a forward pass, these bytes are the stored activations.
    """
    how: Literal["cuda", "tracked", "predicted"]
    """Measurement method: CUDA allocator counters, counted storages on the CPU, or counted storages of fake tensors."""

    def __str__(self) -> str:
        return f"peak {self.peak / 2**20:.1f} MiB, afterwards {self.kept / 2**20:.1f} MiB ({self.how})"


def measure_memory(
    step: Callable[[], object], *, device: torch.device | str = "cpu", predict: bool = False
) -> MemoryReport:
    """Run `step()` and measure the memory that it uses, in bytes, in addition to the memory in use before the step.

    Args:
        step: Function to measure, such as a forward pass or a training step. Its result counts as memory in use after the step.
        device: Device on which the step runs, either the CPU or a CUDA device.
        predict: Whether to run the step with fake tensors, which allocate no memory. The step must then create all its tensors
            itself, including the model. The report includes the parameters of the model. To exclude them, measure the model
            separately.

    Raises:
        TypeError: If `step` cannot be called.
        ValueError: If `device` is neither the CPU nor a CUDA device, unless `predict` is set.

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
            f"step must be a function, such as `lambda: net(x)`; got a {kind}. If that is the result of a step, pass the step "
            f"itself"
        )
    if predict:
        with FakeTensorMode():
            return _tracked(step, "predicted")
    if torch.device(device).type == "cuda":
        return _on_cuda(step, torch.device(device))
    if torch.device(device).type != "cpu":
        raise ValueError(f"device must be the CPU or a CUDA device; got {device}. For other devices use predict=True")
    return _tracked(step, "tracked")


@dataclass(frozen=True)
class BatchMemory:
    """Predicted memory of a step, in bytes, as a function of the batch size.

    Examples:
        >>> memory = revflow.predict_memory(lambda batch: torch.zeros(batch, 1024).sum())
        >>> memory.peak(200) > memory.peak(100)
        True
    """

    peaks: tuple[tuple[int, int], ...]
    """Pairs (fixed bytes, bytes per sample), in descending order of batch size.

    Each pair describes a moment in the step at which memory peaks for a range of batch sizes.
    """

    def peak(self, batch: int) -> int:
        """Return the largest number of bytes in use at any one time, for a batch size of `batch`."""
        return max(fixed + sample * batch for fixed, sample in self.peaks)

    def largest_batch(self, capacity: int) -> int:
        """Return the largest batch size whose peak is at most `capacity` bytes, or 0 if there is none.

        In practice, a step requires more device memory than its peak: for workspaces, for allocator fragmentation and, on CUDA
        devices, half a GiB for CUDA itself.

        Raises:
            ValueError: If the peak does not grow with the batch size, so that no batch is too large.
        """
        limits = [(capacity - fixed) // sample for fixed, sample in self.peaks if sample]
        if not limits:
            raise ValueError(
                "the step's memory does not grow with the batch: make its input with the batch size that it is called with"
            )
        return max(min(limits), 0) if self.peak(0) <= capacity else 0


def predict_memory(step: Callable[[int], object]) -> BatchMemory:
    """Predict the memory of a step for every batch size from a single run with fake tensors.

        memory = revflow.predict_memory(training_step)  # training_step(batch) makes the model and its input
        memory.peak(8), memory.largest_batch(16 * 2**30)

    The batch size of this run is a large prime number. A tensor's size in bytes is thus a multiple of this number only if the
    tensor grows with the batch size. For batch sizes of 2 or more, the peaks equal those measured by `measure_memory`. For a
    batch size of 1, the peak may differ by the size of a few streams: slices of a single sample may be contiguous even if slices
    of several samples are not. Such slices may then be shared instead of copied, or vice versa.

    Args:
        step: Function that takes a batch size and creates all its tensors, including the model. The size of each tensor must be
            either proportional to the batch size or independent of it. The sequence of operations must not depend on the batch
            size, so loops over samples and `memory_budget` are not supported.

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
        """Bytes as requested, before the allocator rounds them up."""
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
            # Autograd calls this operator most often. The short cut saves a fifth of the time.
            return args[0].fake_device
        # Storages that the step was given do not count, even if an operator returns a view of them. A constant that torch.tensor
        # has just made (such as Adam's step counts) does: it first appears as an argument of lift_fresh.
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
            self._add(size - self._sizes[key])  # The operator has resized its argument.
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
    """Counts bytes as fixed + `_SAMPLE` * bytes per sample, and records all local maxima of that count."""

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


_SAMPLE = 2**60  # More than all fixed bytes.


def _is_below(steep: tuple[int, int], middle: tuple[int, int], flat: tuple[int, int]) -> bool:
    """Whether the line `middle` is nowhere above both others."""
    # With a growing batch, `steep` overtakes `middle` no later than `middle` overtakes `flat`.
    return (flat[0] - middle[0]) * (steep[1] - middle[1]) >= (middle[0] - steep[0]) * (middle[1] - flat[1])


def _storages(tree: object) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in _tensors(tree)}


def _tensors(tree: object) -> Iterator[Tensor]:
    """The tensors among an operator's arguments or results."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list, dict)):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(branch)
