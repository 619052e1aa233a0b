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

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from revflow._memory.dataless import DatalessMode
from revflow._memory.step import dataless
from revflow._memory.storages import MANY, BatchStorages, LiveStorages


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
        predict: Whether to run the step with fake tensors, which allocate no memory. As with `predict_memory`, the model can be
            built inside or outside of the step. The report includes its parameters only if it is built inside.

    Raises:
        TypeError: If `step` cannot be called.
        ValueError: If `device` is neither the CPU nor a CUDA device, unless `predict` is set.
        RuntimeError: If `predict` is set and the step depends on unknown values. For details, see `predict_memory`.

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
        with dataless() as mode:
            return _tracked(step, "predicted", mode)
    if torch.device(device).type == "cuda":
        return _on_cuda(step, torch.device(device))
    if torch.device(device).type != "cpu":
        raise ValueError(f"device must be the CPU or a CUDA device; got {device}. For other devices use predict=True")
    return _tracked(step, "tracked", None)


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

    The batch size of this run is a large prime number. A tensor's size in bytes is thus a multiple of this number only if the
    tensor grows with the batch size. For batch sizes of 2 or more, the peaks equal those measured by `measure_memory`. For a
    batch size of 1, the peak may differ by the size of a few streams, because slices of one sample may be contiguous.

    The peak excludes tensors that exist before the step, such as a model that is built outside of it. The prediction leaves all
    tensors, modules, optimizers, schedulers, GradScalers and PyTorch's random states unchanged. Most values are unknown: a float
    that the step reads, such as `loss.item()`, is 1.0. Buffers that cuDNN or oneDNN store for RNNs are excluded.

    Args:
        step: Function that takes a batch size and creates its input. The size of each tensor must be either proportional to the
            batch size or independent of it. The sequence of operations must not depend on the batch size, so loops over samples
            and `memory_budget` are not supported.

    Raises:
        RuntimeError: If the step reads an unknown integer or boolean, as in `if torch.isnan(loss)` or `x[mask]`, or converts a
            tensor to a NumPy array. The message names the line of the step.

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
    with dataless() as mode, BatchStorages(mode) as live:
        result = step(MANY)
        del result
    return BatchMemory(live.peaks())


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


def _tracked(
    step: Callable[[], object], how: Literal["tracked", "predicted"], mode: DatalessMode | None
) -> MemoryReport:
    with LiveStorages(mode) as live:
        result = step()
        report = MemoryReport(live.peak, live.now, how)
    del result
    return report
