"""Two evaluations of a module, of which the second finds the state of the first.

The first evaluation runs in the forward pass, without a graph. The second one runs in the backward pass, with a graph.
Between the two, a training loop may draw random numbers, leave an autocast context, switch to eval mode or update
BatchNorm's statistics. So a `Replay` records for one evaluation:

- the random states of the CPU and of the streams' device, if the evaluation drew from them (`random_states`);
- autocast (`autocast`), the default dtype and the kernels for attention (`process_settings`);
- the train/eval mode of each submodule;
- the buffers that the evaluation changed, such as spectral norm's vectors, as they were before it (`buffers`);
- tensors in attributes that it changed, as they were before it, and switches such as an adapter's (`attributes`).

The second evaluation starts from these, and leaves all state as it was before it, so that BatchNorm's running statistics are
updated once. The caller passes the parameters, so that those of `torch.func.functional_call` are used. Numbers in Python
attributes, files and the random generators of other libraries are not recorded.

All this runs for every conditioner in every step. Modules that consist only of PyTorch's own layers (`KNOWN`) cost almost
nothing: they change only BatchNorm's statistics, which they do not read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from revflow._base.torch_private import (
    caches_parametrizations,
    has_global_hook,
    is_any_autocast,
    set_grad_enabled,
    unchanged_versions,
)
from revflow._replay.attributes import Attributes, give_back
from revflow._replay.autocast import AutocastState, autocast, autocast_state
from revflow._replay.buffers import Buffer, Slots, buffers_of
from revflow._replay.known import KNOWN
from revflow._replay.mode import is_evaluating, this_thread
from revflow._replay.process_settings import EvaluationContext, ProcessSettings, process_settings
from revflow._replay.random_states import Drawing, Draws, evaluation_lock, random_states, restore_random_states
from revflow._replay.refusals import LAZY, changes_refused, refuse_moved, refuse_sharded

T = TypeVar("T")
_NOTHING = nullcontext()


class _Own(NamedTuple):
    """The modes and parameters of a module's own, which an evaluation replaces while it runs."""

    modes: list[bool]
    slots: list[tuple[Slots, str, Tensor | None, int]]
    """A slot and its name, the parameter in it, and the position in `Replay.parameters` of its replacement."""


class Replay(Drawing):
    """An evaluation of `module` on `device` that can be repeated: `first` runs once, then `again` any number of times.

    "Known" modules are those of `KNOWN` without hooks. All others are "foreign": they may change state or draw random numbers.
    """

    # Defaults are attributes of the class. Most modules need no other values, and creating an instance then costs nothing.
    escaped: Sequence[str] = ()
    """Attributes and buffers in which the last evaluation left tensors of its graph."""
    place, is_followed = "", False
    """Set by the guard: the module's place, and whether the tensors that the evaluations create are followed."""
    renormalized: Sequence[Tensor] = ()
    """Tables of embeddings with max_norm, which scale their rows down in each evaluation."""
    _moved: Sequence[Buffer] = ()
    _hooked: Sequence[Tensor] = ()
    """Parameters on which the first evaluation registered hooks. Those that the second one registers again are removed."""
    _count = 0
    """The number of tensors that `moved` returned."""
    _attributes: Attributes | None = None
    _settings: ProcessSettings | None = None

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        # Autocast is off for most blocks. This test then spares them the call.
        self.autocast: AutocastState = autocast_state(device) if is_any_autocast() else []
        self.parameters: list[Tensor] = []
        """The distinct parameters in the module's slots, including those that functional_call inserted."""
        self._device = device
        self.modules = [module]
        self.modes: list[bool] = []
        self._slots: list[tuple[Slots, str, int]] = []
        """A slot for a parameter, its name, and the parameter's position in `parameters`."""
        self.buffers: list[Buffer] = []
        """Buffers that an evaluation may change."""
        self._foreign: list[nn.Module] = []
        with evaluation_lock:  # another thread replaces parameters in the slots while it evaluates
            self._inspect_modules()
        self.is_known = not (self._foreign or has_global_hook())
        """Whether only PyTorch's own layers run. None of them draws random numbers, or reads state that it changes."""

    def _inspect_modules(self) -> None:
        """Collect the submodules, their modes, parameters and buffers, and which of them are foreign."""
        modules, modes, held, parameters = self.modules, self.modes, self._slots, self.parameters
        seen = {*modules}
        positions: dict[int, int] = {}
        for m in modules:  # grows during the loop
            own = m.__dict__
            training: bool = own["training"]
            modes.append(training)
            is_known = type(m) in KNOWN and not (own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own)
            if not is_known:
                self._foreign.append(m)
                refuse_sharded(m)
                if getattr(m, "max_norm", None) is not None:
                    self.renormalized = [*self.renormalized, *m._parameters.values()]  # type: ignore[list-item]
            for child in own["_modules"].values():
                if child is not None and child not in seen:
                    seen.add(child)
                    modules.append(child)
            slots: Slots = own["_parameters"]
            for name, parameter in slots.items():
                if parameter is not None:
                    position = positions.get(id(parameter))
                    if position is None:
                        if type(parameter) is UninitializedParameter:
                            raise RuntimeError(LAZY.format(type(m).__name__))
                        position = positions[id(parameter)] = len(parameters)
                        parameters.append(parameter)
                    held.append((slots, name, position))
            if own["_buffers"] and (training or not is_known):
                self.buffers += buffers_of(m)

    def first(self, draws: Draws, function: Callable[..., T], *arguments: object) -> T:
        """Call `function` for the first time, with gradients off, and record the state that it found."""
        if self.is_known and not self.buffers:
            if not self.autocast:
                return function(*arguments)
            return self._under_autocast(function, *arguments)
        with evaluation_lock:
            if self.is_known:
                return self._under_autocast(function, *arguments)
            return self._first_of_foreign(draws, function, *arguments)

    @property
    def checked(self) -> list[Tensor]:
        """The parameters, whose versions reveal changes between the passes. `p.data` has a version of its own.

        It hides the changes of embeddings with max_norm, which scale their tables in each evaluation.
        """
        return [p.data if any(p is r for r in self.renormalized) else p for p in self.parameters]

    def _evaluation_context(self, given: ProcessSettings) -> AbstractContextManager[Any, Any]:
        """A context with the settings `given`, for the evaluation of foreign modules; an empty one if nothing would differ."""
        if self.renormalized:
            stack = ExitStack()
            stack.enter_context(unchanged_versions(self.renormalized))
            stack.enter_context(EvaluationContext(given))
            return stack
        # Attention's fast path exists only in eval mode.
        if not all(self.modes) or caches_parametrizations() or given != process_settings():
            return EvaluationContext(given)
        return _NOTHING

    def _under_autocast(self, function: Callable[..., T], *arguments: object) -> T:
        if self.autocast or is_any_autocast():
            with autocast(self.autocast, self._device):
                return function(*arguments)
        return function(*arguments)

    def _first_of_foreign(self, draws: Draws, function: Callable[..., T], *arguments: object) -> T:
        """`first`, for a module that contains foreign ones."""
        self._settings = process_settings()
        outer = is_evaluating()
        this_thread.evaluating = True
        try:
            attributes = Attributes(self._foreign)
            for buffer in self.buffers:
                buffer.take()
            frozen = [(p, p._version) for p in self.parameters if not p.requires_grad]
            hooks = [_hooks_of(p) for p in self.parameters]
            draws.begin(self, self._device)
            with self._evaluation_context(self._settings):
                result = self._under_autocast(function, *arguments)
            for buffer in self.buffers:
                buffer.drop_if_unchanged()
            attributes.keep_changes()
            refuse_moved(frozen)
            self._hooked = [p for p, before in zip(self.parameters, hooks, strict=True) if _hooks_of(p) > before]
            self._attributes = attributes if attributes.matter else None
        finally:
            this_thread.evaluating = outer
        return result

    def again(self, parameters: Sequence[Tensor], function: Callable[..., T], *arguments: object) -> T:
        """Call `function` again, with gradients on. `parameters`, in the order of `self.parameters`, replace the module's own."""
        return self._repeat(True, parameters, function, *arguments)

    def values(self, parameters: Sequence[Tensor], function: Callable[..., T], *arguments: object) -> T:
        """As `again`, without a graph."""
        return self._repeat(False, parameters, function, *arguments)

    def _repeat(self, graph: bool, parameters: Sequence[Tensor], function: Callable[..., T], *arguments: object) -> T:
        with evaluation_lock:
            modes = [m.training for m in self.modules]
            held = [(slots, name, slots[name], i) for slots, name, i in self._slots if slots[name] is not parameters[i]]
            if not self.is_known or self.buffers or held or modes != self.modes:
                own = _Own(modes, held)
                with self._evaluation_context(self._settings or process_settings()) if self._foreign else _NOTHING:
                    return self._run_changed(graph, parameters, own, function, *arguments)
        return self._run(graph, function, *arguments)  # changes nothing, and so needs no lock

    def _run(self, graph: bool, function: Callable[..., T], *arguments: object) -> T:
        outer = getattr(this_thread, "recomputing", False)
        this_thread.recomputing = True
        if graph:
            set_grad_enabled(True)
        try:
            if not self.autocast and not is_any_autocast():
                return function(*arguments)
            return self._under_autocast(function, *arguments)
        finally:
            if graph:
                set_grad_enabled(False)
            this_thread.recomputing = outer

    def _run_changed(
        self, graph: bool, parameters: Sequence[Tensor], own: _Own, function: Callable[..., T], *arguments: object
    ) -> T:
        """As `_run`, with the recorded state in the module and in the random generators; their own is restored afterwards."""
        random = None if self.random is None else random_states(self._device)
        attributes = [] if self._attributes is None else self._attributes.lend()
        hooks = [_hooks_of(p) for p in self._hooked]
        try:
            if own.modes != self.modes:
                self._set_modes(self.modes)
            for slots, name, _, i in own.slots:
                slots[name] = parameters[i]
            copies: dict[int, Tensor] = {}
            for buffer in self.buffers:
                buffer.lend(copies)
            if self.random is not None:
                restore_random_states(self.random, self._device)
            return self._run(graph, function, *arguments)
        finally:
            if random is not None:
                restore_random_states(random, self._device)
            self.escaped = [place for buffer in self.buffers if (place := buffer.give_back())]
            for slots, name, parameter, _ in own.slots:
                slots[name] = parameter
            for parameter, before in zip(self._hooked, hooks, strict=True):
                for number in _hooks_of(parameter) - before:
                    del parameter._backward_hooks[number]  # type: ignore[union-attr]
            if own.modes != self.modes:
                self._set_modes(own.modes)
            if self._attributes is not None:
                self.escaped += self._attributes.escaped()
                give_back(attributes)

    def switches(self) -> tuple[object, ...]:
        """The values of the switches after the first evaluation."""
        return () if self._attributes is None else self._attributes.switches()

    def moved(self) -> list[Tensor]:
        """The values, before the first evaluation, of the buffers and attributes that it changed.

        They are removed from here, and autograd saves them: so they are freed with the graph.
        """
        self._moved = [buffer for buffer in self.buffers if buffer.before is not None]
        values: list[Tensor] = [buffer.before for buffer in self._moved]  # type: ignore[misc]
        for buffer in self._moved:
            buffer.before = None
        of_attributes = [] if self._attributes is None else self._attributes.moved()
        self._count = len(values) + len(of_attributes)
        return values + of_attributes

    def recall(self, moved: Sequence[Tensor]) -> Sequence[Tensor]:
        """Insert the values that `moved` removed, the first ones in this list. Returns the others."""
        for buffer, value in zip(self._moved, moved, strict=False):
            buffer.before = value
        if self._attributes is not None:
            self._attributes.recall(moved[len(self._moved) : self._count])
        return moved[self._count :]

    def refusing_changes_of_parameters(self, user: str) -> AbstractContextManager[None]:
        """A context for a further evaluation, which must not change parameters; they are checked if a buffer changed before.

        The first evaluation of a block that initializes itself sets a flag, in a buffer. A further evaluation gets the flag's
        earlier value, and would initialize the block again.
        """
        has_changed_buffer = any(buffer.before is not None for buffer in self.buffers)
        return changes_refused(user, self.parameters if has_changed_buffer else ())

    def _set_modes(self, modes: list[bool]) -> None:
        for module, mode in zip(self.modules, modes, strict=True):
            module.training = mode


def _hooks_of(parameter: Tensor) -> frozenset[int]:
    return frozenset(parameter._backward_hooks or ())
