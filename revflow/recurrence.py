"""ReversibleRecurrence: a stack of recurrent cells that trains through time without storing what happens inside of a step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import MethodType
from typing import Any, overload

import torch
from torch import Tensor, nn

from revflow._base.streams import Streams
from revflow._base.torch_private import allow_recompilations
from revflow._guard.policy import Guard, Mode
from revflow._replay.mode import engine_applies, refuse_replica
from revflow._through_time.functions import run
from revflow._through_time.states import States, storage_of
from revflow._through_time.steps import StepInput
from revflow.cell import RecurrentCell, RecurrentState

Tensors = tuple[Tensor, ...]


class ReversibleRecurrence(nn.ModuleList):
    """Recurrent cells, one upon the other, over time.

    In training a step stores its input streams and the new states and memories, which the next step needs anyway. The
    backward pass rebuilds everything else, cell by cell: it evaluates every `update` twice in all, every `mix` three times.
    Gradients are those of ordinary autograd; that of a state or a stream which a step returned is what comes to it from behind
    that step.

    Args:
        cells: the cells, the first one at the bottom.
        states: how new states and memories are kept for the backward pass.
            "kept": on the device, as they are.
            "bfloat16": on the device, rounded to bfloat16; whatever follows sees the rounded values, so that gradients are
                those of what was computed.
            "offloaded": in the CPU's memory; on CUDA pinned, and copied beside the computation.
            n, a number: those of every n-th step, as they are; the others are computed again. Memory falls by about n, `update`
                runs 3 - 1 / n times in all.
        guard: as for a ReversibleSequence. The guard compares what each cell returns in its second evaluation with the states
            that the forward pass left.

    States are found in the step that made them if they are passed on as they came, in the dtype that they had; what was done
    to them between two steps (a mask, say) is kept besides, on the device.

    Under `revflow.ordinary_autograd`, `no_grad`, forward-mode differentiation, `torch.func`'s transforms and `torch.export` it
    runs as ordinary modules do. Second derivatives are refused.

    Raises TypeError for a cell that is no RecurrentCell or a state that is no RecurrentState, ValueError where the state does not
    fit the cells.

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
        >>> outputs, last = net([(x, x), None, None], state)  # the second and third step are fed back
        >>> outputs[-1][0].sum().backward()
    """

    def __init__(self, cells: Iterable[RecurrentCell], *, states: States = "kept", guard: Mode = "warn") -> None:
        super().__init__()
        self._storage, self._guard, self._states = storage_of(states), Guard(guard), states
        for k, cell in enumerate(cells):
            if not isinstance(cell, RecurrentCell):
                raise TypeError(f"cell {k} has to be a revflow.RecurrentCell; got a {type(cell).__name__}")
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
        """The streams that leave each step, and the last step's state.

        Args:
            inputs: the streams of each step; None where the last step's output is fed back.
            state: before the first step.
        """
        outputs: list[Streams] = []
        for t, streams in enumerate(inputs):
            if streams is None and not outputs:
                raise ValueError("inputs[0] is None: there is no output yet that could be fed back")
            output, state = self.step(outputs[t - 1] if streams is None else streams, state, **context)
            outputs.append(output)
        return outputs, state

    def step(self, streams: Streams, state: RecurrentState, **context: Any) -> tuple[Streams, RecurrentState]:
        """One step: the streams that leave the last cell, and the new state."""
        self._check(streams, state)
        if not engine_applies():
            return self.plain_step(streams, state, **context)
        refuse_replica(self)
        return self._rebuilt_step(streams, state, context)  # type: ignore[no-any-return]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _rebuilt_step(
        self, streams: Streams, state: RecurrentState, context: dict[str, Any]
    ) -> tuple[Streams, RecurrentState]:
        given = StepInput(streams, state.cells, state.memories[-1], context)
        streams, results = run(self._cells(), given, self._storage, self._guard)
        return streams, RecurrentState(tuple(new for new, _ in results), tuple(left for _, left in results))

    def plain_step(self, streams: Streams, state: RecurrentState, **context: Any) -> tuple[Streams, RecurrentState]:
        """`step` under ordinary autograd, which stores every activation."""
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
        """Compile `update` and `mix` of every cell, in place, by `torch.compile(..., **options)`; returns the recurrence.

        The engine itself stays out of compiled graphs, and raises dynamo's limit of recompilations.
        """
        # Up to 19 graphs of a part: with gradients and without; in train mode and in eval mode; in the first steps, where states
        # may be one tensor of zeros, and later; for batches of one size and of any.
        allow_recompilations(32)
        compiled: dict[Any, Any] = {}
        for cell in self._cells():
            for name in ("update", "mix"):
                part = getattr(type(cell), name)
                if part not in compiled:
                    compiled[part] = torch.compile(part, **options)
                setattr(cell, name, MethodType(compiled[part], cell))
        return self

    def _check(self, streams: Streams, state: RecurrentState) -> None:
        if not isinstance(state, RecurrentState):
            raise TypeError(f"state has to be a revflow.RecurrentState; got a {type(state).__name__}")
        if not len(self):
            raise ValueError("this ReversibleRecurrence has no cells")
        if not len(self) == len(state.cells) == len(state.memories):
            raise ValueError(
                f"state has to hold the states and the memories of {len(self)} cells; it holds {len(state.cells)} states and "
                f"{len(state.memories)} memories"
            )
        named = {"streams": streams}
        named |= {f"state.cells[{k}]": tensors for k, tensors in enumerate(state.cells)}
        named |= {f"state.memories[{k}]": tensors for k, tensors in enumerate(state.memories)}
        for name, tensors in named.items():
            if not isinstance(tensors, tuple):
                raise TypeError(f"{name} has to be a tuple of tensors; got a {type(tensors).__name__}")

    def _cells(self) -> list[RecurrentCell]:
        return list(self)  # type: ignore[arg-type]
