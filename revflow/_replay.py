"""Evaluate a module twice, so that the second evaluation sees what the first one saw.

The first evaluation runs in the forward pass without a graph; the second one, in the backward pass, with one.
Between the two a training loop may draw random numbers, leave an autocast context, switch to eval mode or move
BatchNorm's statistics. A `Replay` remembers, for one evaluation:

- the random state of the CPU and of the streams' device, kept only if something was drawn;
- the autocast state of both;
- the train/eval mode of every submodule;
- the buffers that the evaluation changed (spectral norm's vectors, say), as they were before it.

The second evaluation leaves all of these as it found them: BatchNorm's running statistics move once. Parameters come
from the caller, so that `functional_call`'s are seen, and gradients are taken of aliases that carry no user's hooks.

Not remembered: state outside the module's buffers (Python attributes, files, other libraries' random generators).
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_thread = threading.local()


def is_recomputing() -> bool:
    """Whether a backward pass is just now evaluating a conditioner for the second time.

    For forward hooks and modules that count or log what they see: they run in both evaluations of a step.
    """
    return getattr(_thread, "recomputing", False)


class Replay:
    """One evaluation of `module` on `device`, to be repeated: `first` once, then `again` any number of times."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._device = device
        self._autocast = _autocast_states(device)
        self._random: _RandomState | None = None
        self._modes: list[tuple[nn.Module, bool]] = []
        self._slots: list[tuple[dict[str, Tensor | None], str, int]] = []
        self._buffers: list[_Buffer] = []
        self.parameters: list[Tensor] = []
        """The distinct parameters that the module held, functional_call's substitutes included."""
        # One plain loop: this runs for every conditioner in every forward pass.
        positions: dict[int, int] = {}
        for m in module.modules():
            self._modes.append((m, m.training))
            for name, parameter in m._parameters.items():
                if parameter is not None:
                    position = positions.setdefault(id(parameter), len(self.parameters))
                    if position == len(self.parameters):
                        self.parameters.append(parameter)
                    self._slots.append((m._parameters, name, position))  # type: ignore[arg-type]
            if m.training:  # an evaluation may change these
                self._buffers += [
                    _Buffer(m._buffers, name) for name, buffer in m._buffers.items() if buffer is not None
                ]

    def first(self, evaluate: Callable[[], Any]) -> Any:
        """Run `evaluate()` without a graph and remember what it saw."""
        before = _RandomState(self._device)
        for buffer in self._buffers:
            buffer.take()
        with torch.no_grad(), _autocast(self._autocast, self._device):
            result = evaluate()
        if before != _RandomState(self._device):
            self._random = before
        for buffer in self._buffers:
            buffer.keep_if_changed()
        return result

    def again(self, evaluate: Callable[[], Any], parameters: Sequence[Tensor]) -> Any:
        """Run `evaluate()` with a graph, on `parameters` (in the order of `self.parameters`) in the module's slots."""
        now = [(m, m.training) for m, _ in self._modes]
        held = [(slots, name, slots[name]) for slots, name, _ in self._slots]
        random = None if self._random is None else _RandomState(self._device)
        outer = is_recomputing()
        _thread.recomputing = True
        try:
            _set_modes(self._modes)
            for slots, name, position in self._slots:
                slots[name] = parameters[position]
            for buffer in self._buffers:
                buffer.lend()
            if self._random is not None:
                self._random.restore()
            with torch.enable_grad(), _autocast(self._autocast, self._device):
                return evaluate()
        finally:
            if random is not None:
                random.restore()
            for buffer in self._buffers:
                buffer.give_back()
            for slots, name, parameter in held:
                slots[name] = parameter
            _set_modes(now)
            _thread.recomputing = outer


def _set_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, mode in modes:
        if module.training != mode:  # setting a module's attribute is slow
            module.training = mode


class _Buffer:
    """A buffer that an evaluation may change, and its value before, if it did."""

    def __init__(self, buffers: dict[str, Tensor | None], name: str) -> None:
        self._buffers, self._name = buffers, name
        self._before: Tensor | None = None
        self._own: Tensor | None = None
        self._version = 0

    def take(self) -> None:
        self._own = self._buffers[self._name]
        assert self._own is not None
        self._version, self._before = self._own._version, self._own.clone()

    def keep_if_changed(self) -> None:
        # BatchNorm moves its statistics without raising their version counters; in train mode it does not read them.
        if self._buffers[self._name] is self._own and self._own is not None and self._own._version == self._version:
            self._before = None
        self._own = None

    def lend(self) -> None:
        """Put a copy in the buffer's place, to be changed at will."""
        self._own = self._buffers[self._name]
        value = self._own if self._before is None else self._before
        self._buffers[self._name] = None if value is None else value.clone()

    def give_back(self) -> None:
        self._buffers[self._name] = self._own
        self._own = None


class _RandomState:
    """The state of the CPU's generator, and of the device's where that is another."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._accelerator = (
            None if device.type in ("cpu", "meta") else torch.get_device_module(device).get_rng_state(device)
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _RandomState) and self._bytes() == other._bytes()

    def _bytes(self) -> list[bytes]:
        # Read behind the dispatcher: fake-tensor modes and memory trackers must not see these tensors.
        states = [state for state in (self._cpu, self._accelerator) if state is not None]
        return [ctypes.string_at(state.data_ptr(), state.nbytes) for state in states]

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._accelerator is not None:
            torch.get_device_module(self._device).set_rng_state(self._accelerator, self._device)


def _autocast_states(device: torch.device) -> list[tuple[str, bool, torch.dtype]]:
    """(device type, enabled, dtype) for the CPU and the streams' device; empty where autocast is off on both."""
    kinds = ("cpu",) if device.type in ("cpu", "meta") else ("cpu", device.type)
    if not any(map(torch.is_autocast_enabled, kinds)):
        return []
    return [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]


@contextmanager
def _autocast(states: list[tuple[str, bool, torch.dtype]], device: torch.device) -> Iterator[None]:
    """Autocast as in `states`, with the cache of cast weights off.

    Older versions of PyTorch (2.13 does not) take a weight that was cast and cached without a graph from the cache in ordinary
    autograd later in the same context, and leave it untrained. And a rerun's casts would stay in the cache for no use.
    """
    states = states or [(kind, False, dtype) for kind, _, dtype in _autocast_states(device)]
    if not states:
        yield
        return
    with ExitStack() as stack:
        for kind, enabled, dtype in states:
            stack.enter_context(torch.autocast(kind, enabled=enabled, dtype=dtype, cache_enabled=False))
        yield
