"""ReversibleSequence: a stack of invertible blocks that trains without storing the activations between them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from revflow._base.memory_size import MemoryBudget
from revflow._base.streams import Streams
from revflow._base.table import number_of_parameters, table
from revflow._base.torch_private import allow_recompilations, compile_call, not_compiled
from revflow._guard.policy import Guard, Mode
from revflow._guard.sequences import witness_of
from revflow._replay.mode import engine_applies
from revflow._replay.refusals import refuse_replica
from revflow._replay.undisturbed import undisturbed
from revflow._rewind.arithmetic import FLOATING, OnGrid
from revflow._rewind.block_list import BlockList, conditioners_in, flattened, refuse_ignored
from revflow._rewind.chain import ChainCall, streams_of, values_are_hidden
from revflow._rewind.direction import FORWARD, INVERSE, Direction
from revflow._rewind.passage import Passage
from revflow._rewind.tape import Tape
from revflow.budget import Budget, Plan
from revflow.exact import Extent, Grid, Residual

_NOT_COMPILED = (
    "a ReversibleSequence in training runs outside of compiled graphs, so that its two evaluations agree: leave out "
    "fullgraph=True, and call net.compile_conditioners() to compile the conditioners, which take most of the time"
)


class ReversibleSequence(BlockList):
    """A stack of invertible blocks that trains without storing the activations between them.

    It is used like `nn.Sequential`. The backward pass recomputes each block's input from its output. After the forward pass only
    the output stays in memory, at any depth. (A gated block also stores one stream.) Each conditioner runs twice per training
    step, so a step takes about 4/3 of the time under standard autograd.

    Args:
        blocks: Couplings, bijections, or any modules with `forward(*streams, **context)` and `inverse(*streams, **context)`;
            a dictionary gives them names. A ReversibleSequence among them counts as its blocks.
        split_dim: Dimension along which a single tensor is split into halves.
        guard: Reaction to recomputed values that differ from those of the forward pass; a few values per block are compared.
            "warn" warns once per sequence above a first tolerance: 1e-4 of the largest stream in float32, 2e-2 under autocast.
            It raises `ReconstructionError` above a second one: 1e-2, or 1e-1 under autocast. "raise" raises above the first,
            "off" compares nothing. With `exact`, any bit that differs is an error.
        exact: True for streams on a grid of 16 bits, or another `Grid`. Recomputed values and all gradients then equal those of
            stored activations to the last bit. (Gradients of a tensor that is used several times within a block and also in
            other blocks are summed in another order.) The input, and everything that a conditioner adds, is rounded to the
            grid, also in `plain` and in inference; the gradient passes straight through. Couplings that do more than add store
            one byte per value, and four more for each value that is all but overwritten (gates above 0.996).
        memory_budget: Memory for activations: bytes, a size such as "6GiB", a share of the device's free memory such as 0.8
            (of the memory that is free at first use), "all" or "none". The last blocks are stored, as many as fit, and the
            others recompute. The first step with a new kind of input (shapes, dtypes, autocast, mode) recomputes everything
            and measures; `plan` predicts the result. All calls that wait for their backward pass share the budget; the first
            step with so many calls shows their number. The budget covers the streams' gradients, but neither the input nor the
            parameters' gradients. A warning reports a budget that even full recomputation exceeds. Within
            `torch.utils.checkpoint` and `save_on_cpu` all blocks recompute.
        chunks: Number of micro-batches per recomputed conditioner, along dimension 0; the conditioner's activations take the
            memory of one. The function is the same, up to rounding and the order in which random numbers are drawn. State that
            moves at each evaluation (spectral norm's vectors, running averages) moves once per micro-batch. Tensors among the
            keyword arguments are split as well: their first dimension must be the batch's, or of size 1. Conditioners that mix
            samples (BatchNorm in train mode) are refused; with guard="off", only BatchNorm is.

    A tensor is split into two streams along `split_dim` and returned as one tensor; a tuple of streams is returned as a tuple.
    Keyword arguments reach every block's conditioners. Tensors among them, also in lists or dictionaries, get gradients. Dropout,
    autocast, train/eval mode and BatchNorm's statistics are the same in both evaluations. Do not change parameters, context or
    the output in place before the backward pass; PyTorch raises an error if you do. Under `no_grad`, forward-mode
    differentiation, `torch.func`'s transforms and `torch.export` it runs like any other module.

    `print(net)` shows a table of the blocks, with equal consecutive blocks in one line. It lists their parameters, and the
    shapes of the streams that each block made in the last training step or `plan`. `print(net[0])` shows a block's modules.

    Raises:
        TypeError, ValueError, RuntimeError: If an argument, a block or its result does not fit. An error inside a block states
            the block's number and the shapes of its streams. Second derivatives are refused; `plain` has them.
        OverflowError: If `exact` is set and a stream exceeds the grid's range; it names the block whose output this is.

    Examples:
        >>> net = revflow.ReversibleSequence([revflow.AdditiveCoupling(torch.nn.Linear(4, 4)) for _ in range(8)])
        >>> x = torch.randn(2, 8)
        >>> net(x).square().mean().backward()  # recomputes the activations
        >>> torch.allclose(net.inverse(net(x)), x, atol=1e-5)
        True
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module] | Mapping[str, nn.Module] = (),
        split_dim: int = 1,
        *,
        guard: Mode = "warn",
        exact: bool | Grid = False,
        memory_budget: MemoryBudget = "none",
        chunks: int = 1,
    ) -> None:
        super().__init__(blocks)
        self.split_dim = split_dim
        if not isinstance(exact, (bool, Grid)):
            raise TypeError(f"exact must be True, False or a revflow.Grid; got {exact!r}")
        self._grid = Grid() if exact is True else exact or None
        self._guard = Guard(guard, exact=self._grid is not None)
        self._budget = Budget(memory_budget)
        self.chunks = chunks
        self._shapes: dict[str, list[torch.Size]] = {}
        """By block: the shapes of its output streams, for the repr."""

    @property
    def memory_budget(self) -> MemoryBudget:
        """The budget as it was given. Assigning a new one discards the measurements."""
        return self._budget.given

    @memory_budget.setter
    def memory_budget(self, budget: MemoryBudget) -> None:
        self._budget = Budget(budget)

    @property
    def chunks(self) -> int:
        """Number of micro-batches per recomputed conditioner."""
        return self._chunks

    @chunks.setter
    def chunks(self, chunks: int) -> None:
        if type(chunks) is not int or chunks < 1:
            raise ValueError(f"chunks must be a whole number of at least 1; got {chunks!r}")
        self._chunks = chunks

    @property
    def exact(self) -> Grid | Literal[False]:
        """The grid of exact arithmetic, or False."""
        return self._grid or False

    def forward(self, x: Tensor | Streams, **context: Any) -> Any:  # type: ignore[override]
        """The last block's output: a tensor for a tensor, a tuple for a tuple of streams."""
        return self._run(x, context)[0]

    def inverse(self, y: Tensor | Streams, **context: Any) -> Any:
        """The input that `forward` maps to `y`; differentiable, with the same memory savings as `forward`."""
        return self._run(y, context, INVERSE)[0]

    def forward_with_log_det(self, x: Tensor | Streams, **context: Any) -> tuple[Any, Tensor]:
        """The output y and log |det dy/dx|, one value per sample: shape (batch,), for normalizing flows.

        The log-determinant is differentiable and costs no further evaluation. Custom blocks require `log_derivative`
        (couplings) or `log_det` (bijections); NotImplementedError names a block that has neither.
        """
        y, log_det = self._run(x, context, log_det=True)
        return y, log_det

    def plain(self, x: Tensor | Streams, **context: Any) -> Any:
        """`forward` under standard autograd, which stores every activation: the same function of the same parameters."""
        return self._chain(x, context).run()[0]

    def forward_with_residuals(self, x: Tensor | Streams, **context: Any) -> tuple[Any, list[Residual]]:
        """The output of `plain(x)`, and the residuals with which `inverse_with_residuals` recovers x to the last bit.

        There is one `Residual` per conditioner whose coupling does more than add, of one byte per value. `inverse` needs none:
        it is exact if all couplings add, and approximate otherwise. RuntimeError unless the sequence is exact.
        """
        residuals: list[Residual] = []
        y, _ = self._chain(x, context, residuals=self._checked_exact(residuals)).run()
        return y, residuals

    @torch.no_grad()
    def inverse_with_residuals(self, y: Tensor | Streams, residuals: Sequence[Residual], **context: Any) -> Any:
        """The input of `forward_with_residuals`, rounded to the grid, from its output `y` and `residuals`; without a graph."""
        left = self._checked_exact(list(residuals))
        x, _ = self._chain(y, context, INVERSE, residuals=left).run()
        if left:
            raise ValueError(
                f"{len(residuals)} residuals were given, and {len(left)} not used: they are of another sequence. Pass those that "
                f"this sequence's forward_with_residuals returned with y"
            )
        return x

    def _checked_exact(self, residuals: list[Residual]) -> list[Residual]:
        if self._grid is None:
            raise RuntimeError("residuals exist only in exact arithmetic: construct the sequence with exact=True")
        return residuals

    def plan(self, x: Tensor | Streams, **context: Any) -> Plan:
        """Predict which blocks a training step on such an input stores, and its memory and time.

        Runs the forward pass five times and leaves buffers and random numbers as they were; nothing is trained. A block's time
        is the median of three runs.
        """
        device = streams_of(x, self.split_dim)[0].device
        with torch.enable_grad(), undisturbed(self, device):
            chain = self._chain(x, context, tape=Tape(context, self.chunks))
            limit, table, first_kept = self._budget.schedule(chain)
        with torch.no_grad(), undisturbed(self, device):
            _, *runs = [self._chain(x, context).seconds() for _ in range(4)]  # The first one warms up.
        seconds = tuple(median(of_block) for of_block in zip(*runs, strict=True))
        return Plan(limit, table.costs, first_kept, table.peaks[first_kept], seconds)

    def compile_conditioners(self, **options: Any) -> ReversibleSequence:
        """Compile the conditioner of every coupling in place, with `torch.compile(..., **options)`; returns the sequence.

        The engine itself stays out of compiled graphs. Compile all of a network or none of it. Both evaluations of a conditioner
        must be compiled, or neither: otherwise dropout draws another mask in the second. At its limit of recompilations (8 per
        function), dynamo runs a function uncompiled. Therefore this raises the limit to the number that the sequence may need.
        """
        conditioners = conditioners_in(self)
        # For each shape of streams, dynamo compiles a conditioner with and without gradients, in train and in eval mode.
        allow_recompilations(4 * len(conditioners) + 8)
        for conditioner in conditioners:
            compile_call(conditioner, **options)
        return self

    @overload
    def __getitem__(self, index: slice) -> ReversibleSequence: ...
    @overload
    def __getitem__(self, index: int) -> nn.Module: ...
    def __getitem__(self, index: slice | int) -> nn.Module:
        if isinstance(index, slice):
            return self._with(dict(list(self._modules.items())[index]))
        block: nn.Module = super().__getitem__(index)
        return block

    def __add__(self, other: nn.Sequential) -> ReversibleSequence:
        for option in ("split_dim", "exact") if isinstance(other, ReversibleSequence) else ():
            own, its = getattr(self, option), getattr(other, option)
            if own != its:
                raise ValueError(
                    f"cannot add sequences with {option}={own} and {option}={its}: set both to the same value"
                )
        return self._with(super().__add__(other))

    def __mul__(self, times: int) -> ReversibleSequence:
        return self._with(super().__mul__(times))

    def _with(self, blocks: Iterable[nn.Module] | Mapping[str, nn.Module]) -> ReversibleSequence:
        return ReversibleSequence(
            blocks,
            self.split_dim,
            guard=self._guard.mode,
            exact=self.exact,
            memory_budget=self.memory_budget,
            chunks=self.chunks,
        )

    def __repr__(self) -> str:
        kind, options = type(self).__name__, self.extra_repr()
        if not self._modules:
            return f"{kind}({options})"
        lines = table(flattened(self), self._shapes, number_of_parameters(self))
        return "\n  ".join([f"{kind}(", options, *lines]) + "\n)"

    def extra_repr(self) -> str:
        options: dict[str, Any] = {"exact": self.exact} if self.exact else {}
        options |= {"memory_budget": self.memory_budget} if self.memory_budget != "none" else {}
        options |= {"chunks": self.chunks} if self.chunks > 1 else {}
        more = "".join(f", {name}={value!r}" for name, value in options.items())
        return f'split_dim={self.split_dim}, guard="{self._guard.mode}"{more}'

    def _run(
        self, x: Tensor | Streams, context: dict[str, Any], direction: Direction = FORWARD, log_det: bool = False
    ) -> tuple[Any, Any]:
        if engine_applies() and not self._budget.keeps_all:
            refuse_replica(self)
            return self._on_a_tape(x, context, direction, log_det)
        return self._chain(x, context, direction, log_det).run()

    # A compiled forward pass would draw other dropout masks than the recomputation.
    @not_compiled(_NOT_COMPILED)
    def _on_a_tape(
        self, x: Tensor | Streams, context: dict[str, Any], direction: Direction, log_det: bool
    ) -> tuple[Any, Any]:
        tape = Tape(context, self.chunks, witness_of(self._guard))
        chain = self._chain(x, context, direction, log_det, tape)
        return self._budget.run(chain) if self._budget.is_limited else chain.run()

    def _chain(
        self,
        x: Tensor | Streams,
        context: dict[str, Any],
        direction: Direction = FORWARD,
        log_det: bool = False,
        tape: Tape | None = None,
        residuals: list[Residual] | None = None,
    ) -> ChainCall:
        """One call of the blocks: with a tape, or without one under standard autograd."""
        streams = streams_of(x, self.split_dim)
        arithmetic = FLOATING
        if self._grid is not None:
            arithmetic = OnGrid(self._grid, None if values_are_hidden(streams) else Extent(self._grid), residuals)
        passage = Passage(direction, arithmetic, log_det, tape)
        refuse_ignored(self, ReversibleSequence.forward)
        blocks = [*flattened(self)]
        join = self.split_dim if isinstance(x, Tensor) else None
        shapes = self._shapes if tape is not None and direction is FORWARD else None
        return ChainCall(blocks[:: direction.sign], passage, streams, join, context, shapes)
