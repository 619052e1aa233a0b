"""Evaluate a module twice, so that the second evaluation sees what the first one saw.

The first evaluation runs in the forward pass without a graph; the second one, in the backward pass, with one.
Between the two a training loop may draw random numbers, leave an autocast context, switch to eval mode or move
BatchNorm's statistics. A `Replay` remembers, for one evaluation:

- the random state of the CPU and of the streams' device, kept only if something was drawn;
- the autocast state of both;
- the train/eval mode of every submodule;
- the buffers that the evaluation changed (spectral norm's vectors, say), as they were before it.

The second evaluation leaves all of these as it found them: BatchNorm's running statistics move once. Parameters come
from the caller, so that `functional_call`'s are seen.

Not remembered: state outside the module's buffers (Python attributes, files, other libraries' random generators).

All this runs for every conditioner in every step. So it is written to cost little where there is nothing to do.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from revflow._torch import has_global_hook

T = TypeVar("T")
AutocastState = list[tuple[str, bool, torch.dtype]]

_thread = threading.local()


def is_recomputing() -> bool:
    """Whether a backward pass is just now evaluating a conditioner for the second time.

    For forward hooks and modules that count or log what they see: they run in both evaluations of a step.
    """
    return getattr(_thread, "recomputing", False)


class Replay:
    """One evaluation of `module` on `device`, to be repeated: `first` once, then `again` any number of times."""

    __slots__ = ("_buffers", "_device", "_modes", "_modules", "_slots", "autocast", "may_draw", "parameters", "random")

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.autocast = autocast_state(device)
        """(device type, enabled, dtype) for the CPU and the streams' device; empty where autocast is off on both."""
        self.parameters: list[Tensor] = []
        """The distinct parameters that the module held, functional_call's substitutes included."""
        self.random: list[Tensor] | None = None
        """The random states before the first evaluation, if it drew from them (`Draws`)."""
        self._device = device
        self._modules = modules = [module]
        self._modes: list[bool] = []
        self._slots: list[tuple[dict[str, Tensor | None], str, int]] = []
        self._buffers: list[_Buffer] = []
        self.may_draw = has_global_hook()
        """Whether the evaluation may draw random numbers. It may, unless all of it is known."""
        known = {module}
        positions: dict[int, int] = {}
        for m in modules:  # which grows on the way
            self._modes.append(m.training)
            if type(m) not in _DETERMINISTIC or m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__:
                self.may_draw = True
                _refuse_sharded(m)
            for child in m._modules.values():
                if child is not None and child not in known:
                    known.add(child)
                    modules.append(child)
            slots: dict[str, Tensor | None] = m._parameters  # type: ignore[assignment]
            for name, parameter in slots.items():
                if parameter is not None:
                    position = positions.get(id(parameter))
                    if position is None:
                        if type(parameter) is UninitializedParameter:
                            raise RuntimeError(_LAZY.format(type(m).__name__))
                        position = positions[id(parameter)] = len(self.parameters)
                        self.parameters.append(parameter)
                    self._slots.append((slots, name, position))
            if m._buffers and m.training:  # an evaluation may change these
                self._buffers += [_Buffer(m._buffers, name) for name, b in m._buffers.items() if b is not None]

    def first(self, draws: Draws, function: Callable[..., T], *arguments: object) -> T:
        """Call `function` where gradients are off, and remember what it saw."""
        if self.may_draw:
            draws.begin(self, self._device)
        for buffer in self._buffers:
            buffer.take()
        if self.autocast:
            with _autocast(self.autocast):
                result = function(*arguments)
        else:
            result = function(*arguments)
        for buffer in self._buffers:
            buffer.keep_if_changed()
        return result

    def again(self, parameters: Sequence[Tensor], function: Callable[..., T], *arguments: object) -> T:
        """Call `function` with gradients on, and `parameters` (in the order of `self.parameters`) in the module's slots."""
        modes = [m.training for m in self._modules]
        held = [(slots, name, slots[name], i) for slots, name, i in self._slots if slots[name] is not parameters[i]]
        random = None if self.random is None else random_states(self._device)
        outer = is_recomputing()
        _thread.recomputing = True
        try:
            if modes != self._modes:
                self._set_modes(self._modes)
            for slots, name, _, i in held:
                slots[name] = parameters[i]
            for buffer in self._buffers:
                buffer.lend()
            if self.random is not None:
                _restore(self.random, self._device)
            torch._C._set_grad_enabled(True)
            if not self.autocast and not torch._C._is_any_autocast_enabled():
                return function(*arguments)
            with _autocast(self.autocast or _switched_off(autocast_state(self._device))):
                return function(*arguments)
        finally:
            torch._C._set_grad_enabled(False)
            if random is not None:
                _restore(random, self._device)
            for buffer in self._buffers:
                buffer.give_back()
            for slots, name, parameter, _ in held:
                slots[name] = parameter
            if modes != self._modes:
                self._set_modes(modes)
            _thread.recomputing = outer

    def _set_modes(self, modes: list[bool]) -> None:
        for module, mode in zip(self._modules, modes, strict=True):
            module.training = mode


@contextmanager
def undisturbed(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Leave the module's buffers and the random states as they were before what runs in this context."""
    states = random_states(device)
    buffers = [_Buffer(m._buffers, name) for m in module.modules() for name, b in m._buffers.items() if b is not None]
    for buffer in buffers:
        buffer.lend()
    try:
        yield
    finally:
        for buffer in buffers:
            buffer.give_back()
        _restore(states, device)


class Draws:
    """Which of a chain's first evaluations drew random numbers.

    The state before an evaluation is compared with the one before the next: so that one state is read for each. It stays
    with the first of the two, in `Replay.random`, if they differ.
    """

    def __init__(self) -> None:
        self._last: tuple[Replay, torch.device, list[Tensor]] | None = None

    def begin(self, replay: Replay, device: torch.device) -> None:
        """The evaluation of `replay` is about to begin."""
        states = random_states(device)
        if self._last is not None:
            self._settle(self._last, states)
        self._last = replay, device, states

    def end(self) -> None:
        """All evaluations are done."""
        if self._last is not None:
            self._settle(self._last, random_states(self._last[1]))
            self._last = None

    def _settle(self, last: tuple[Replay, torch.device, list[Tensor]], states: list[Tensor]) -> None:
        replay, _, before = last
        if len(before) != len(states):  # another device
            replay.random = before
            return
        for a, b in zip(before, states, strict=True):
            # Compared in place and behind the dispatcher: fake-tensor modes and memory trackers must not see these tensors.
            if _memcmp(a.data_ptr(), b.data_ptr(), a.nbytes):
                replay.random = before


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


def _refuse_sharded(module: nn.Module) -> None:
    """FSDP gathers a module's parameters when it is called: after the engine has taken those that the module held."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported here: that takes long
    if fsdp is None or not isinstance(module, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)):
        return
    if next(module.parameters(), None) is not None:
        raise RuntimeError(
            f"fully_shard was called on a {type(module).__name__} that the engine runs by itself: its parameters would get no "
            f"gradient. Call fully_shard on the sequence, on what holds it or the recurrence, or on a coupling as a whole"
        )


def random_states(device: torch.device) -> list[Tensor]:
    """The state of the CPU's generator, and of the device's where that is another."""
    cpu = torch.default_generator.get_state()
    return [cpu] if device.type in ("cpu", "meta") else [cpu, torch.get_device_module(device).get_rng_state(device)]


def _restore(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.get_device_module(device).set_rng_state(state, device)


def autocast_state(device: torch.device) -> AutocastState:
    if not torch._C._is_any_autocast_enabled():
        return []
    kind = device.type
    on_device = kind not in ("cpu", "meta") and torch.is_autocast_enabled(kind)
    if not on_device and not torch.is_autocast_enabled("cpu"):
        return []
    kinds = ("cpu",) if kind in ("cpu", "meta") else ("cpu", kind)
    return [(k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds]


def _switched_off(state: AutocastState) -> AutocastState:
    return [(kind, False, dtype) for kind, _, dtype in state]


@contextmanager
def _autocast(state: AutocastState) -> Iterator[None]:
    """Autocast as in `state`, with the cache of cast weights off.

    Older versions of PyTorch (2.13 does not) take a weight that was cast and cached without a graph from the cache in
    ordinary autograd later in the same context, and leave it untrained. And a rerun's casts would stay in the cache for
    no use.
    """
    with ExitStack() as stack:
        for kind, enabled, dtype in state:
            stack.enter_context(torch.autocast(kind, enabled=enabled, dtype=dtype, cache_enabled=False))
        yield


# Reading the CPU's random state takes as long as a small linear layer: these modules are known to leave it alone.
_LAZY = (
    "a {} has not seen an input yet, and so has no parameters that could be trained: call the network once within "
    "`with torch.no_grad():`"
)
_DETERMINISTIC = frozenset({
    nn.Sequential, nn.ModuleList, nn.Identity, nn.Flatten, nn.Unflatten, nn.Linear, nn.Embedding,
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU,
    nn.SiLU, nn.GELU, nn.Mish, nn.Softplus, nn.Tanh, nn.Sigmoid, nn.Hardswish,
})  # fmt: skip
_memcmp = (ctypes.cdll.msvcrt if os.name == "nt" else ctypes.CDLL(None)).memcmp
_memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
