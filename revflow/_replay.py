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
        self._module = module
        self._device = device
        self._modes = [m.training for m in module.modules()]
        self._autocast = _autocast_states(device)
        self._random: _RandomState | None = None
        self._buffers: dict[tuple[nn.Module, str], Tensor] = {}
        held = [(m, name, p) for m in module.modules() for name, p in m._parameters.items() if p is not None]
        self.parameters: list[Tensor] = list({id(p): p for _, _, p in held}.values())
        """The distinct parameters that the module held, functional_call's substitutes included."""
        position = {id(p): k for k, p in enumerate(self.parameters)}
        self._slots = [(m, name, position[id(p)]) for m, name, p in held]

    def first(self, evaluate: Callable[[], Any]) -> Any:
        """Run `evaluate()` without a graph and remember what it saw."""
        before = _RandomState(self._device)
        buffers = [
            (m, name, buffer, buffer._version, buffer.clone()) for m, name, buffer in _moving_buffers(self._module)
        ]
        with torch.no_grad(), _autocast(self._autocast, self._device):
            result = evaluate()
        if before != _RandomState(self._device):
            self._random = before
        # BatchNorm moves its statistics without raising their version counters; in train mode it does not read them.
        for m, name, buffer, version, value in buffers:
            if m._buffers[name] is not buffer or buffer._version != version:
                self._buffers[m, name] = value
        return result

    def again(self, evaluate: Callable[[], Any], parameters: Sequence[Tensor]) -> Any:
        """Run `evaluate()` with a graph, on `parameters` (in the order of `self.parameters`) in the module's slots."""
        with ExitStack() as stack:
            stack.enter_context(_recomputing())
            stack.enter_context(_training_modes(self._module, self._modes))
            stack.enter_context(self._substituted(parameters))
            if self._random is not None:
                stack.enter_context(self._random.restored())
            stack.enter_context(torch.enable_grad())
            stack.enter_context(_autocast(self._autocast, self._device))
            return evaluate()

    @contextmanager
    def _substituted(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """Put `parameters`, and copies of the buffers, in their slots; what was there comes back afterwards."""
        own_parameters = [(m, name, m._parameters[name]) for m, name, _ in self._slots]
        own_buffers = _moving_buffers(self._module)
        try:
            for m, name, k in self._slots:
                m._parameters[name] = parameters[k]  # type: ignore[assignment]
            for m, name, buffer in own_buffers:
                m._buffers[name] = self._buffers.get((m, name), buffer).clone()
            yield
        finally:
            for m, name, parameter in own_parameters:
                m._parameters[name] = parameter
            for m, name, buffer in own_buffers:
                m._buffers[name] = buffer


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

    @contextmanager
    def restored(self) -> Iterator[None]:
        now = _RandomState(self._device)
        self._set()
        try:
            yield
        finally:
            now._set()

    def _set(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._accelerator is not None:
            torch.get_device_module(self._device).set_rng_state(self._accelerator, self._device)


def _autocast_states(device: torch.device) -> list[tuple[str, bool, torch.dtype]]:
    """(device type, enabled, dtype) for the CPU and the streams' device; empty where autocast is off on both."""
    kinds = [kind for kind in dict.fromkeys(("cpu", device.type)) if torch.amp.is_autocast_available(kind)]
    states = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]
    return states if any(enabled for _, enabled, _ in states) else []


@contextmanager
def _autocast(states: list[tuple[str, bool, torch.dtype]], device: torch.device) -> Iterator[None]:
    """Autocast as in `states`, with the cache of cast weights off.

    A weight that was cast and cached without a graph would be taken from the cache by ordinary autograd later in the
    same context, and would get no gradient.
    """
    with ExitStack() as stack:
        for kind, enabled, dtype in states or [(kind, False, dtype) for kind, _, dtype in _autocast_states(device)]:
            stack.enter_context(torch.autocast(kind, enabled=enabled, dtype=dtype, cache_enabled=False))
        yield


@contextmanager
def _recomputing() -> Iterator[None]:
    outer = is_recomputing()
    _thread.recomputing = True
    try:
        yield
    finally:
        _thread.recomputing = outer


@contextmanager
def _training_modes(module: nn.Module, modes: list[bool]) -> Iterator[None]:
    modules = list(module.modules())
    now = [m.training for m in modules]
    if now == modes:
        yield
        return
    for m, mode in zip(modules, modes, strict=True):
        m.training = mode
    try:
        yield
    finally:
        for m, mode in zip(modules, now, strict=True):
            m.training = mode


def _moving_buffers(module: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """The buffers that an evaluation may change: those of modules in train mode."""
    return [
        (m, name, buffer)
        for m in module.modules()
        if m.training
        for name, buffer in m._buffers.items()
        if buffer is not None
    ]
