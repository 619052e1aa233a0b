"""The bytes of the storages that operators return, counted until each is freed."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from revflow._base.host_memory import is_in_host_memory
from revflow._base.torch_private import FakeTensor, TorchDispatchMode
from revflow._memory.dataless import DatalessMode, tensors_in

MANY = 3_000_000_019
"""The batch size of a predicted step: a large prime number."""


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of the storages that operators return, until each is freed."""

    def __init__(self, dataless: DatalessMode | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}
        self._dataless = dataless

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            # Autograd calls this operator most often. The short cut saves a fifth of the time.
            return args[0].fake_device
        # Storages that the step was given do not count, even if an operator returns a view of them. A constant that torch.tensor
        # has just made (such as Adam's step counts) does: it first appears as an argument of lift_fresh.
        given = set()
        if func is not torch.ops.aten.lift_fresh.default:
            tensors = list(tensors_in((args, kwargs)))
            if self._dataless is not None and not all(type(tensor) is FakeTensor for tensor in tensors):
                args, kwargs = self._dataless.without_data((args, kwargs))
                tensors = list(tensors_in((args, kwargs)))
            given = {tensor.untyped_storage()._cdata for tensor in tensors}
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            self._count(tensor, given)
        return result

    def _count(self, tensor: Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        size = self._size(storage)
        if key in self._sizes:
            self._add(size - self._sizes[key])  # The operator has resized its argument.
            self._sizes[key] = size
        elif key not in given and tensor.device.type != "meta" and not is_in_host_memory():
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


class BatchStorages(LiveStorages):
    """Counts bytes as fixed + `_SAMPLE` * bytes per sample, and records all local maxima of that count."""

    def __init__(self, dataless: DatalessMode) -> None:
        super().__init__(dataless)
        self._maxima = {0}
        self._rises = False

    def _size(self, storage: torch.UntypedStorage) -> int:
        size = storage.nbytes()
        return size if size % MANY else size // MANY * _SAMPLE

    def _add(self, size: int) -> None:
        if self._rises and size < 0:
            self._maxima.add(self.now)
        self._rises = size >= 0
        super()._add(size)

    def peaks(self) -> tuple[tuple[int, int], ...]:
        """The upper envelope of the maxima, which are lines over the batch size."""
        peaks: list[tuple[int, int]] = []
        for maximum in sorted(self._maxima | {self.now}, reverse=True):
            sample, fixed = divmod(maximum, _SAMPLE)
            if peaks and fixed <= peaks[-1][0]:
                continue
            while len(peaks) > 1 and _is_below(peaks[-2], peaks[-1], (fixed, sample)):
                peaks.pop()
            peaks.append((fixed, sample))
        return tuple(peaks)


_SAMPLE = 2**60  # More than all fixed bytes.


def _is_below(steep: tuple[int, int], middle: tuple[int, int], flat: tuple[int, int]) -> bool:
    """Whether the line `middle` is nowhere above both others."""
    # With a growing batch, `steep` overtakes `middle` no later than `middle` overtakes `flat`.
    return (flat[0] - middle[0]) * (steep[1] - middle[1]) >= (middle[0] - steep[0]) * (middle[1] - flat[1])
