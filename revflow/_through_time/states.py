"""How the states between the steps of a recurrence are kept, until the backward pass needs them.

`pack` makes of a step's results what the step saves for its backward pass, `unpack` the results again. What is saved is
freed step by step, as everything that autograd saves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from revflow._base.host_memory import in_host_memory
from revflow._base.streams import Tensors

States = Literal["kept", "bfloat16", "offloaded"] | int
"""How a recurrence keeps its states: the type of `ReversibleRecurrence`'s `states`."""


class Kept:
    """On the device, as they are."""

    prefetches = False
    """Whether to begin to unpack what an earlier step has saved while a later one is at work."""
    rounds = False
    """Whether states lose digits."""

    def rounded(self, tensor: Tensor) -> Tensor:
        """What becomes of a new state before anything uses it."""
        return tensor

    def keeps(self, number: int) -> bool:
        """Whether the results of this step are saved. The other steps' are computed again."""
        return True

    def pack(self, results: Tensors) -> Tensors:
        return results

    def unpack(self, packed: Tensors, like: Sequence[Like]) -> Unpacked:
        return Unpacked(packed)


class EveryNth(Kept):
    """Those of every n-th step, as they are."""

    def __init__(self, n: int) -> None:
        self._n = n

    def keeps(self, number: int) -> bool:
        return (number + 1) % self._n == 0


class InBfloat16(Kept):
    """On the device, in bfloat16. The forward pass goes on with the rounded values: gradients are of what was computed."""

    rounds = True

    def rounded(self, tensor: Tensor) -> Tensor:
        if not _is_wider(tensor.dtype):
            return tensor
        # Exact, and with the identity for a derivative: rounded to x + (rounded - x).
        own = tensor.detach()
        return tensor + (own.bfloat16().to(own.dtype) - own)

    def pack(self, results: Tensors) -> Tensors:
        return tuple([t.bfloat16() if _is_wider(t.dtype) else t for t in results])

    def unpack(self, packed: Tensors, like: Sequence[Like]) -> Unpacked:
        return Unpacked(tuple([t.to(dtype) for t, (dtype, _) in zip(packed, like, strict=True)]))


class Offloaded(Kept):
    """In the CPU's memory. On CUDA in pinned memory, copied beside the computation."""

    prefetches = True

    def pack(self, results: Tensors) -> Tensors:
        with in_host_memory():
            return tuple(map(_to_host, results))

    def unpack(self, packed: Tensors, like: Sequence[Like]) -> Unpacked:
        tensors = tuple([_to_device(t, device) for t, (_, device) in zip(packed, like, strict=True)])
        on_cuda = [t.device for t in tensors if t.is_cuda]
        return Unpacked(tensors, _copies(on_cuda[0]).record_event() if on_cuda else None)


Like = tuple[torch.dtype, torch.device]
"""What a result was."""


class Unpacked:
    """Results of a step that are there, or on their way."""

    def __init__(self, tensors: Tensors, event: Any = None) -> None:
        self._tensors, self._event = tensors, event

    def tensors(self) -> Tensors:
        if self._event is not None:
            torch.cuda.current_stream(self._tensors[0].device).wait_event(self._event)
        return self._tensors


def keeping(states: States) -> Kept:
    """How to keep what `states` says."""
    named = {"kept": Kept, "bfloat16": InBfloat16, "offloaded": Offloaded}
    if isinstance(states, str) and states in named:
        return named[states]()
    if isinstance(states, int) and not isinstance(states, bool) and states >= 1:
        return EveryNth(states)
    raise ValueError(
        f'states has to be "kept", "bfloat16", "offloaded", or n (1 or more) to keep every n-th step\'s; got {states!r}'
    )


def _is_wider(dtype: torch.dtype) -> bool:
    return dtype in (torch.float32, torch.float64)


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in the CPU's memory, perhaps still on its way."""
    if tensor.device.type != "cuda":
        return tensor.to("cpu", copy=True)
    stream = _copies(tensor.device)
    stream.wait_stream(torch.cuda.current_stream(tensor.device))
    with torch.cuda.stream(stream):
        host = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
    tensor.record_stream(stream)  # not to be used again before it is copied
    return host


def _to_device(host: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, which is there when the stream of copies has come to this point."""
    if device.type != "cuda":
        return host.to(device, copy=True)
    stream, tensor = _copies(device), torch.empty_like(host, device=device)
    stream.wait_stream(torch.cuda.current_stream(device))  # which may still use the memory that the tensor has got
    with torch.cuda.stream(stream):
        tensor.copy_(host, non_blocking=True)
    tensor.record_stream(stream)
    return tensor


_streams: dict[torch.device, Any] = {}


def _copies(device: torch.device) -> Any:
    """The stream that copies between this device and the CPU, in the order of the calls."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]
