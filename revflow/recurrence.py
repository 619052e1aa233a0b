"""ReversibleRecurrence: a stack of recurrent cells that trains through time without storing activations inside a time step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import MethodType
from typing import Any, overload

import torch
from torch import nn

from revflow._base.streams import Streams
from revflow._base.torch_private import allow_recompilations
from revflow._guard.policy import Guard, Mode
from revflow._replay.mode import engine_applies
from revflow._replay.refusals import refuse_replica
from revflow._through_time.functions import run
from revflow._through_time.states import States, storage_of
from revflow._through_time.steps import StepInput
from revflow.cell import RecurrentCell, RecurrentState


class ReversibleRecurrence(nn.ModuleList):
    """A stack of recurrent cells, trained through time.

    In training, each time step stores its input streams and the new states and memories, which the next one needs anyway. The
    backward pass recomputes everything else, cell by cell. In total, every `update` is evaluated twice and every `mix` three
    times. Gradients equal those of standard autograd. The gradient of a state or a stream that a time step returned sums up the
    contributions of all operations after that time step.

    Args:
        cells: Recurrent cells, from the first to the last.
        states: Storage of new states and memories until the backward pass:
            `"kept"` stores them on the device, unchanged.
            `"bfloat16"` stores them on the device, rounded to bfloat16. All later operations read the rounded values, so that
                gradients are exactly those of the computed function.
            `"offloaded"` stores them in the CPU's memory; on CUDA it is pinned, and copies overlap with the computation.
            A number n stores those of every n-th time step, unchanged, and recomputes the others. Memory falls by a factor of
                about n, and `update` runs 3 - 1 / n times in total.
        guard: Reaction to wrongly recomputed values, as in `ReversibleSequence`. The guard compares the results of each cell's
            second evaluation with the states of the forward pass.

    Pass states from step to step as they are, in the dtype that they have: they are then found in the step that made them. The
    result of an operation on them between two steps, such as a mask, is stored additionally, on the device.

    Under `revflow.ordinary_autograd`, `no_grad`, forward-mode differentiation, `torch.func`'s transforms and `torch.export` it
    runs like any other module. Second derivatives are refused.

    Raises:
        TypeError: If a cell is not a RecurrentCell, a state is not a RecurrentState, or streams are not a tuple of tensors.
        ValueError: If a state does not have one entry per cell, or `states` or `guard` has an unknown value.

    Examples:
        >>> class Cell(revflow.RecurrentCell):
        ...     def update(self, streams, state, memory, context):
        ...         return (torch.tanh(streams[0] + state[0]),), memory
        ...
        ...     def mix(self, streams, state, context):
        ...         return streams[1] + state[0], streams[0]
        >>> net = revflow.ReversibleRecurrence([Cell(), Cell()])
        >>> x = torch.randn(2, 4, requires_grad=True)
        >>> state = revflow.RecurrentState(cells=((x,), (x,)), memories=((), ()))
        >>> outputs, last = net([(x, x), None, None], state)  # steps 2 and 3 read the last output
        >>> outputs[-1][0].sum().backward()
    """

    def __init__(self, cells: Iterable[RecurrentCell], *, states: States = "kept", guard: Mode = "warn") -> None:
        super().__init__()
        self._storage, self._guard, self._states = storage_of(states), Guard(guard), states
        for k, cell in enumerate(cells):
            if not isinstance(cell, RecurrentCell):
                raise TypeError(f"cell {k} must be a revflow.RecurrentCell; got a {type(cell).__name__}")
            self.append(cell)

    @overload
    def __getitem__(self, index: slice) -> ReversibleRecurrence: ...
    @overload
    def __getitem__(self, index: int) -> nn.Module: ...
    def __getitem__(self, index: slice | int) -> nn.Module:
        if isinstance(index, slice):
            return ReversibleRecurrence(self._cells()[index], states=self._states, guard=self._guard.mode)
        return super().__getitem__(index)

    def forward(
        self, inputs: Sequence[Streams | None], state: RecurrentState, **context: Any
    ) -> tuple[list[Streams], RecurrentState]:
        """The output streams of each time step, and the last state.

        Args:
            inputs: Streams of each time step; None feeds back the output of the step before.
            state: State before the first time step.
        """
        outputs: list[Streams] = []
        for t, streams in enumerate(inputs):
            if streams is None and not outputs:
                raise ValueError(
                    "inputs[0] is None, but the first time step has no earlier output to feed back: pass its streams"
                )
            output, state = self.step(outputs[t - 1] if streams is None else streams, state, **context)
            outputs.append(output)
        return outputs, state

    def step(self, streams: Streams, state: RecurrentState, **context: Any) -> tuple[Streams, RecurrentState]:
        """One time step: the last cell's output streams, and the new state."""
        self._check(streams, state)
        if not engine_applies():
            return self.plain_step(streams, state, **context)
        refuse_replica(self)
        return self._recomputed_step(streams, state, context)  # type: ignore[no-any-return]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _recomputed_step(
        self, streams: Streams, state: RecurrentState, context: dict[str, Any]
    ) -> tuple[Streams, RecurrentState]:
        given = StepInput(streams, state.cells, state.memories[-1], context)
        streams, results = run(self._cells(), given, self._storage, self._guard)
        return streams, RecurrentState(tuple(new for new, _ in results), tuple(left for _, left in results))

    def plain_step(self, streams: Streams, state: RecurrentState, **context: Any) -> tuple[Streams, RecurrentState]:
        """`step` under standard autograd, which stores every activation."""
        memory = state.memories[-1]
        cells, memories = [], []
        for cell, its_state in zip(self._cells(), state.cells, strict=True):
            new, left = cell.update(streams, its_state, memory, context)
            its_state, memory = (tuple(map(self._storage.rounded, tensors)) for tensors in (new, left))
            streams = cell.mix(streams, its_state, context)
            cells.append(its_state)
            memories.append(memory)
        return streams, RecurrentState(tuple(cells), tuple(memories))

    def compile_cells(self, **options: Any) -> ReversibleRecurrence:
        """Compile `update` and `mix` of every cell in place, with `torch.compile(..., **options)`; returns the recurrence.

        The engine itself stays out of compiled graphs. This raises dynamo's limit of recompilations.
        """
        # A method needs up to 19 graphs: with and without gradients, in train and in eval mode, for the first time steps (whose
        # states may share one tensor of zeros) and the later ones, and for batches of one size and of any size.
        allow_recompilations(32)
        compiled: dict[Any, Any] = {}
        for cell in self._cells():
            for name in ("update", "mix"):
                method = getattr(type(cell), name)
                if method not in compiled:
                    compiled[method] = torch.compile(method, **options)
                setattr(cell, name, MethodType(compiled[method], cell))
        return self

    def _check(self, streams: Streams, state: RecurrentState) -> None:
        if not isinstance(state, RecurrentState):
            raise TypeError(f"state must be a revflow.RecurrentState; got a {type(state).__name__}")
        if not len(self):
            raise ValueError("this ReversibleRecurrence has no cells: construct it with one or more")
        if not len(self) == len(state.cells) == len(state.memories):
            raise ValueError(
                f"state must have states and memories of {len(self)} cells; it has {len(state.cells)} states and "
                f"{len(state.memories)} memories. Pass an empty tuple for a cell without a memory"
            )
        named = {"streams": streams}
        named |= {f"state.cells[{k}]": tensors for k, tensors in enumerate(state.cells)}
        named |= {f"state.memories[{k}]": tensors for k, tensors in enumerate(state.memories)}
        for name, tensors in named.items():
            if not isinstance(tensors, tuple):
                raise TypeError(f"{name} must be a tuple of tensors; got a {type(tensors).__name__}")

    def _cells(self) -> list[RecurrentCell]:
        return list(self)  # type: ignore[arg-type]
