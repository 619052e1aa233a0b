"""ReversibleRecurrence: a stack of recurrent cells that trains through time without storing activations inside a time step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import MethodType
from typing import Any, overload

import torch
from torch import nn

from revflow._base.memory_size import MemoryBudget
from revflow._base.streams import Streams
from revflow._base.torch_private import allow_recompilations
from revflow._captured.time_step import captured_step
from revflow._guard.policy import Guard, Mode
from revflow._replay.mode import engine_applies
from revflow._replay.refusals import refuse_replica
from revflow._through_time.call import StepCall
from revflow._through_time.functions import Results
from revflow._through_time.states import States, storage_of
from revflow._through_time.steps import StepInput
from revflow._through_time.stored import run_stored
from revflow.budget import Budget, Budgeted
from revflow.cell import RecurrentCell, RecurrentState


class ReversibleRecurrence(Budgeted, nn.ModuleList):
    """A stack of recurrent cells that is trained by backpropagation through time.

    It is a subclass of `nn.ModuleList`. By default, the input streams, new states and new memories of each time step are
    stored. (The next time step requires the states and memories in any case.) The backward pass recomputes all other activations,
    cell by cell. In total, every `update` is evaluated twice, and every `mix` is evaluated three times. Gradients equal those
    computed by standard autograd. The gradient of a state or stream returned by a time step is the sum of the contributions of
    all later operations.

    Args:
        cells: Recurrent cells, from the first to the last.
        states: Storage method for new states and memories until the backward pass: `"kept"` (unchanged, on the device),
            `"bfloat16"` (rounded to bfloat16, on the device), `"offloaded"` (in CPU memory), or an integer n. In `"bfloat16"`
            mode, all later operations use the rounded values, so gradients are exact for the function that is computed. In
            `"offloaded"` mode with CUDA, the CPU memory is pinned, and copies overlap with computation. If an integer n is given,
            the states and memories of every n-th time step are stored unchanged, and the others are recomputed. The states then
            use about 1/n of the memory, and each `update` is evaluated 3 - 1 / n times in total.
        guard: Reaction to incorrect recomputed values, as in `ReversibleSequence`. The guard compares the results of each cell's
            second evaluation with the states from the forward pass.
        memory_budget: Memory for activations, as in `ReversibleSequence`, or a `Budget` that several modules share. The
            activations of as many of the last time steps as fit are stored; their cells are evaluated once. With "max", every
            time step is a `plain_step`.

    Pass each state to the next time step exactly as it was returned, in the same dtype, so that the engine recognizes it. If you
    change a state between two time steps, for example with a mask, the changed state is also stored on the device.

    Under `revflow.ordinary_autograd`, `no_grad`, forward-mode differentiation, `torch.func` transforms and `torch.export`, a
    recurrence runs like any other module. Second derivatives are not supported and raise an error.

    Raises:
        TypeError: If a cell is not a `RecurrentCell`, a state is not a `RecurrentState`, or streams are not a tuple of tensors.
        ValueError: If a state does not have one entry per cell, or if `states`, `guard` or `memory_budget` is invalid.

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

    def __init__(
        self,
        cells: Iterable[RecurrentCell],
        *,
        states: States = "kept",
        guard: Mode = "warn",
        memory_budget: MemoryBudget | Budget = "min",
    ) -> None:
        super().__init__()
        self._storage, self._guard, self._states = storage_of(states), Guard(guard), states
        self.memory_budget = memory_budget
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
            return ReversibleRecurrence(
                self._cells()[index], states=self._states, guard=self._guard.mode, memory_budget=self.memory_budget
            )
        return super().__getitem__(index)

    def forward(
        self, inputs: Sequence[Streams | None], state: RecurrentState, **context: Any
    ) -> tuple[list[Streams], RecurrentState]:
        """Run all time steps. Return the output streams of each time step and the last state.

        Args:
            inputs: Input streams for each time step. If an entry is None, the output of the previous time step is used.
            state: The state before the first time step.
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
        """Run one time step. Return the output streams of the last cell and the new state."""
        self._check(streams, state)
        if not engine_applies() or self._keeper.stores_all:
            return self.plain_step(streams, state, **context)
        refuse_replica(self)
        if torch.compiler.is_compiling():
            results = captured_step(self, streams, state, context, self._objection_to_capture())
            if results is not None:
                return _outputs(results)
        return _outputs(self._run(StepInput(streams, state.cells, state.memories[-1], context)))

    def _objection_to_capture(self) -> str:
        """The reason why time steps cannot be part of a compiled graph; empty if there is none."""
        if self._states != "kept":
            return f"only the engine stores states in another way (states={self._states!r})"
        if self._keeper.is_limited:
            return f"only the engine plans a memory budget ({self.memory_budget!r})"
        return ""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _run(self, given: StepInput) -> Results:
        call = StepCall(self._cells(), given, self._storage, self._guard)
        return self._keeper.run(call) if self._keeper.is_limited else call.run()

    def plain_step(self, streams: Streams, state: RecurrentState, **context: Any) -> tuple[Streams, RecurrentState]:
        """Run `step` under standard autograd, which stores every activation."""
        given = StepInput(streams, state.cells, state.memories[-1], context)
        return _outputs(run_stored(self._cells(), given, self._storage))

    def compile_cells(self, **options: Any) -> ReversibleRecurrence:
        """Compile each cell's `update` and `mix` methods in place with `torch.compile(..., **options)`. Return the recurrence.

        The engine is not part of the compiled graphs. This method increases dynamo's recompilation limit.
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


def _outputs(results: Results) -> tuple[Streams, RecurrentState]:
    streams, of_cells = results
    return streams, RecurrentState(tuple(new for new, _ in of_cells), tuple(left for _, left in of_cells))
