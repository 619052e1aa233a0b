"""Evaluate a module twice, so that the second evaluation sees what the first one saw.

The first evaluation runs in the forward pass without a graph; the second one, in the backward pass, with one.
Between the two a training loop may draw random numbers, leave an autocast context, switch to eval mode or move
BatchNorm's statistics. A `Replay` remembers, for one evaluation:

- the random state of the CPU and of the streams' device, kept only if something was drawn (`random_states`);
- autocast, the default dtype and the kernels for attention (`surroundings`);
- the train/eval mode of every submodule;
- the buffers that the evaluation changed (spectral norm's vectors, say), as they were before it (`buffers`);
- tensors in attributes that it changed, as they were before it, and switches such as an adapter's (`attributes`).

The second evaluation leaves all of these as it found them: BatchNorm's running statistics move once. Parameters come
from the caller, so that `functional_call`'s are seen.

Not remembered: numbers in Python attributes, files, other libraries' random generators.

All this runs for every conditioner in every step. Modules that consist of PyTorch's own layers alone (`KNOWN`) pay next to
nothing: they change nothing but BatchNorm's statistics, which they do not read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
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
from revflow._replay.buffers import Buffer, buffers_of
from revflow._replay.known import KNOWN
from revflow._replay.random_states import Drawing, Draws, alone, random_states, restore_random_states
from revflow._replay.refusals import LAZY, refuse_moved, refuse_sharded
from revflow._replay.surroundings import AutocastState, Surroundings, Within, autocast, autocast_state, surroundings

T = TypeVar("T")
_thread = threading.local()
_NOTHING = nullcontext()


def is_recomputing() -> bool:
    """Whether a backward pass is just now evaluating a conditioner for the second time.

    For forward hooks and modules that count or log what they see: they run in both evaluations of a step.

    Examples:
        >>> class Counting(torch.nn.Linear):
        ...     calls = 0
        ...
        ...     def forward(self, x):
        ...         if not revflow.is_recomputing():
        ...             type(self).calls += 1
        ...         return super().forward(x)
        >>> net = revflow.ReversibleSequence([revflow.AdditiveCoupling(Counting(4, 4))])
        >>> net(torch.randn(2, 8)).sum().backward()
        >>> Counting.calls
        1
    """
    return getattr(_thread, "recomputing", False)


def is_evaluating() -> bool:
    """Whether a conditioner is just now evaluated for the first time."""
    return getattr(_thread, "evaluating", False)


class _Lent(NamedTuple):
    """What a module holds itself, while an evaluation puts other things there."""

    modes: list[bool]
    slots: list[tuple[dict[str, Tensor | None], str, Tensor | None, int]]


class Replay(Drawing):
    """One evaluation of `module` on `device`, to be repeated: `first` once, then `again` any number of times."""

    # Most modules need none of these: as attributes of the class they cost a block nothing.
    escaped: Sequence[str] = ()
    """Attributes in which the last evaluation left tensors of its graph."""
    place, is_followed = "", False
    """For the guard: where this is, and whether to follow closely what the evaluations make."""
    renormalised: Sequence[Tensor] = ()
    """Tables that embeddings with max_norm scale down whenever they are evaluated."""
    _moved: Sequence[Buffer] = ()
    _hooked: Sequence[Tensor] = ()
    """Parameters on which the first evaluation has registered hooks: those of the second one would be too many."""
    _count = 0
    _attributes: Attributes | None = None
    _surroundings: Surroundings | None = None

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.autocast: AutocastState = autocast_state(device)
        self.parameters: list[Tensor] = []
        """The distinct parameters that the module held, functional_call's substitutes included."""
        self._device = device
        self.modules = [module]
        self.modes: list[bool] = []
        self._slots: list[tuple[dict[str, Tensor | None], str, int]] = []
        self.buffers: list[Buffer] = []
        """Those that an evaluation may change."""
        self._foreign: list[nn.Module] = []
        with alone:  # another thread may have put other parameters in the slots for a time
            self._look_at_modules()
        self.is_known = not (self._foreign or has_global_hook())
        """Whether nothing but PyTorch's own layers runs, none of which draws random numbers or reads what it changes."""

    def _look_at_modules(self) -> None:
        modules, modes, held, parameters = self.modules, self.modes, self._slots, self.parameters
        known = {*modules}
        positions: dict[int, int] = {}
        for m in modules:  # which grows on the way
            own = m.__dict__
            training: bool = own["training"]
            modes.append(training)
            is_known = type(m) in KNOWN and not (own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own)
            if not is_known:
                self._foreign.append(m)
                refuse_sharded(m)
                if getattr(m, "max_norm", None) is not None:
                    self.renormalised = [*self.renormalised, *m._parameters.values()]  # type: ignore[list-item]
            for child in own["_modules"].values():
                if child is not None and child not in known:
                    known.add(child)
                    modules.append(child)
            slots: dict[str, Tensor | None] = own["_parameters"]
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
        """Call `function` where gradients are off, and remember what it saw."""
        if self.is_known and not self.buffers:
            if not self.autocast:
                return function(*arguments)
            return self._called(function, *arguments)
        with alone:
            if self.is_known:
                return self._called(function, *arguments)
            return self._first_of_foreign(draws, function, *arguments)

    @property
    def checked(self) -> list[Tensor]:
        """The parameters, whose versions tell of changes; copies that share none in the place of those that are scaled."""
        return [p.data if any(p is r for r in self.renormalised) else p for p in self.parameters]

    def _care(self, given: Surroundings) -> AbstractContextManager[Any, Any]:
        """What the evaluation of modules that the engine does not know needs, if anything."""
        if self.renormalised:
            stack = ExitStack()
            stack.enter_context(unchanged_versions(self.renormalised))
            stack.enter_context(Within(given))
            return stack
        if not all(self.modes) or caches_parametrizations() or given != surroundings():
            return Within(given)
        return _NOTHING

    def _called(self, function: Callable[..., T], *arguments: object) -> T:
        if self.autocast or is_any_autocast():
            with autocast(self.autocast, self._device):
                return function(*arguments)
        return function(*arguments)

    def _first_of_foreign(self, draws: Draws, function: Callable[..., T], *arguments: object) -> T:
        self._surroundings = surroundings()
        outer = is_evaluating()
        _thread.evaluating = True
        try:
            attributes = Attributes(self._foreign)
            for buffer in self.buffers:
                buffer.take()
            frozen = [(p, p._version) for p in self.parameters if not p.requires_grad]
            hooks = [_hooks_of(p) for p in self.parameters]
            draws.begin(self, self._device)
            with self._care(self._surroundings):
                result = self._called(function, *arguments)
            for buffer in self.buffers:
                buffer.keep_if_changed()
            attributes.keep_changes()
            refuse_moved(frozen)
            self._hooked = [p for p, before in zip(self.parameters, hooks, strict=True) if _hooks_of(p) > before]
            self._attributes = attributes if attributes.matter else None
        finally:
            _thread.evaluating = outer
        return result

    def again(self, parameters: Sequence[Tensor], function: Callable[..., T], *arguments: object) -> T:
        """Call `function` with gradients on, and `parameters` (in the order of `self.parameters`) in the module's slots."""
        return self._repeat(True, parameters, function, *arguments)

    def values(self, parameters: Sequence[Tensor], function: Callable[..., T], *arguments: object) -> T:
        """The same without a graph."""
        return self._repeat(False, parameters, function, *arguments)

    def _repeat(self, graph: bool, parameters: Sequence[Tensor], function: Callable[..., T], *arguments: object) -> T:
        with alone:
            modes = [m.training for m in self.modules]
            held = [(slots, name, slots[name], i) for slots, name, i in self._slots if slots[name] is not parameters[i]]
            if not self.is_known or self.buffers or held or modes != self.modes:
                lent = _Lent(modes, held)
                with self._care(self._surroundings or surroundings()) if self._foreign else _NOTHING:
                    return self._run_changed(graph, parameters, lent, function, *arguments)
        return self._run(graph, function, *arguments)  # beside other threads: nothing is changed for its time

    def _run(self, graph: bool, function: Callable[..., T], *arguments: object) -> T:
        outer = getattr(_thread, "recomputing", False)
        _thread.recomputing = True
        if graph:
            set_grad_enabled(True)
        try:
            if not self.autocast and not is_any_autocast():
                return function(*arguments)
            return self._called(function, *arguments)
        finally:
            if graph:
                set_grad_enabled(False)
            _thread.recomputing = outer

    def _run_changed(
        self, graph: bool, parameters: Sequence[Tensor], lent: _Lent, function: Callable[..., T], *arguments: object
    ) -> T:
        """The same, where the module has to be changed for the time of the evaluation."""
        random = None if self.random is None else random_states(self._device)
        attributes = [] if self._attributes is None else self._attributes.lend()
        hooks = [_hooks_of(p) for p in self._hooked]
        try:
            if lent.modes != self.modes:
                self._set_modes(self.modes)
            for slots, name, _, i in lent.slots:
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
            for slots, name, parameter, _ in lent.slots:
                slots[name] = parameter
            for parameter, before in zip(self._hooked, hooks, strict=True):
                for number in _hooks_of(parameter) - before:
                    del parameter._backward_hooks[number]  # type: ignore[union-attr]
            if lent.modes != self.modes:
                self._set_modes(lent.modes)
            if self._attributes is not None:
                self.escaped += self._attributes.escaped()
                give_back(attributes)

    def switches(self) -> tuple[object, ...]:
        """Their values when the first evaluation ended."""
        return () if self._attributes is None else self._attributes.switches()

    def moved(self) -> list[Tensor]:
        """The values of those buffers and attributes that the first evaluation has changed, before it; taken out, for autograd to
        save."""
        self._moved = [buffer for buffer in self.buffers if buffer.before is not None]
        values: list[Tensor] = [buffer.before for buffer in self._moved]  # type: ignore[misc]
        for buffer in self._moved:
            buffer.before = None
        of_attributes = [] if self._attributes is None else self._attributes.moved()
        self._count = len(values) + len(of_attributes)
        return values + of_attributes

    def recall(self, moved: Sequence[Tensor]) -> Sequence[Tensor]:
        """Bring back what `moved` has taken out: the first of these. Returns the others."""
        for buffer, value in zip(self._moved, moved, strict=False):
            buffer.before = value
        if self._attributes is not None:
            self._attributes.recall(moved[len(self._moved) : self._count])
        return moved[self._count :]

    @contextmanager
    def refusing_changes_of_parameters(self, user: str) -> Iterator[None]:
        """Put back what an evaluation changes in parameters, and say so. It may, if it initialises them from its input."""
        copies = (
            [p.detach().clone() for p in self.parameters] if any(b.before is not None for b in self.buffers) else []
        )
        try:
            yield
        finally:
            changed = [(p, c) for p, c in zip(self.parameters, copies, strict=False) if not torch.equal(p, c)]
            for parameter, copy in changed:
                parameter.data.copy_(copy)
        if changed:
            raise RuntimeError(
                f"{user} changed a parameter of shape {tuple(changed[0][0].shape)}, which is put back: a block that initialises "
                f"itself from its first input has to do so before it is trained. Call the network once within "
                f"`with torch.no_grad():`"
            )

    def _set_modes(self, modes: list[bool]) -> None:
        for module, mode in zip(self.modules, modes, strict=True):
            module.training = mode


def _hooks_of(parameter: Tensor) -> frozenset[int]:
    return frozenset(parameter._backward_hooks or ())
