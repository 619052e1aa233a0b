"""How the states between the time steps of a recurrence are stored until the backward pass needs them.

`pack` turns the results of a step into the tensors that the step saves for its backward pass. `unpack` turns them back.
Autograd frees saved tensors step by step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from revflow._base.host_memory import in_host_memory
from revflow._base.streams import Tensors
from revflow._budget.step_costs import Handling

States = Literal["kept", "bfloat16", "offloaded"] | int
"""The type of the `states` argument of `ReversibleRecurrence`, which selects how states are stored."""


class Storage:
    """On the device, unchanged; the base class of the other ways."""

    prefetches = False
    """Whether to start unpacking the results of an earlier step while a later one is recomputed."""
    rounds = False
    """Whether states lose digits."""
    handling = Handling(stored=1, unpacked=0, repeated=0)
    """The memory and the work of a recomputed step."""

    def rounded(self, tensor: Tensor) -> Tensor:
        """A new state, before anything uses it."""
        return tensor

    def stores(self, number: int) -> bool:
        """Whether the results of the step of this number are saved. Those of other steps are recomputed."""
        return True

    def pack(self, results: Tensors) -> Tensors:
        return results

    def unpack(self, packed: Tensors, like: Sequence[Like]) -> Unpacked:
        return Unpacked(packed)


class EveryNth(Storage):
    """The results of every n-th step on the device, unchanged."""

    def __init__(self, n: int) -> None:
        self._n = n
        self.handling = Handling(stored=1 / n, unpacked=n, repeated=1 - 1 / n)

    def stores(self, number: int) -> bool:
        return (number + 1) % self._n == 0


class InBfloat16(Storage):
    """On the device, in bfloat16.

    The forward pass continues with the rounded values. So the gradients belong to the values that it computed.
    """

    rounds = True
    handling = Handling(stored=0.5, unpacked=2, repeated=0)

    def rounded(self, tensor: Tensor) -> Tensor:
        if not _is_wider(tensor.dtype):
            return tensor
        # x + (rounded - x) is exactly the rounded value, and the derivative of the sum is the identity.
        own = tensor.detach()
        return tensor + (own.bfloat16().to(own.dtype) - own)

    def pack(self, results: Tensors) -> Tensors:
        return tuple([t.bfloat16() if _is_wider(t.dtype) else t for t in results])

    def unpack(self, packed: Tensors, like: Sequence[Like]) -> Unpacked:
        return Unpacked(tuple([t.to(dtype) for t, (dtype, _) in zip(packed, like, strict=True)]))


class Offloaded(Storage):
    """In the CPU's memory; from a CUDA device in pinned memory, copied while the device computes."""

    prefetches = True
    handling = Handling(stored=0, unpacked=3, repeated=0)

    def pack(self, results: Tensors) -> Tensors:
        with in_host_memory():
            return tuple(map(_to_host, results))

    def unpack(self, packed: Tensors, like: Sequence[Like]) -> Unpacked:
        tensors = tuple([_to_device(t, device) for t, (_, device) in zip(packed, like, strict=True)])
        on_cuda = [t.device for t in tensors if t.is_cuda]
        return Unpacked(tensors, _copies(on_cuda[0]).record_event() if on_cuda else None)


Like = tuple[torch.dtype, torch.device]
"""The dtype and the device of a result."""


class Unpacked:
    """The results of a step, available or still being copied to the device."""

    def __init__(self, tensors: Tensors, event: Any = None) -> None:
        self._tensors, self._event = tensors, event

    def tensors(self) -> Tensors:
        if self._event is not None:
            torch.cuda.current_stream(self._tensors[0].device).wait_event(self._event)
        return self._tensors


def storage_of(states: States) -> Storage:
    """The way of storing states that the option `states` names."""
    named = {"kept": Storage, "bfloat16": InBfloat16, "offloaded": Offloaded}
    if isinstance(states, str) and states in named:
        return named[states]()
    if isinstance(states, int) and not isinstance(states, bool) and states >= 1:
        return EveryNth(states)
    options = ", ".join(f'"{name}"' for name in named)
    raise ValueError(f"states must be {options}, or a number n >= 1 to store every n-th step's; got {states!r}")


def _is_wider(dtype: torch.dtype) -> bool:
    return dtype in (torch.float32, torch.float64)


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in the CPU's memory, which may still be in progress."""
    if tensor.device.type != "cuda":
        return tensor.to("cpu", copy=True)
    stream = _copies(tensor.device)
    stream.wait_stream(torch.cuda.current_stream(tensor.device))
    with torch.cuda.stream(stream):
        host = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
    tensor.record_stream(stream)  # its memory must not be reused before it is copied
    return host


def _to_device(host: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, complete when the CUDA stream of copies has reached this point."""
    if device.type != "cuda":
        return host.to(device, copy=True)
    stream, tensor = _copies(device), torch.empty_like(host, device=device)
    stream.wait_stream(torch.cuda.current_stream(device))  # which may still use the tensor's memory
    with torch.cuda.stream(stream):
        tensor.copy_(host, non_blocking=True)
    tensor.record_stream(stream)
    return tensor


_streams: dict[torch.device, Any] = {}


def _copies(device: torch.device) -> Any:
    """The CUDA stream that copies between this device and the CPU, in the order of the calls."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]
