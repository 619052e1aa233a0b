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
from revflow._captured.chain import captured
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
from revflow.budget import Budget, Budgeted, Plan
from revflow.exact import Extent, Grid, Residual


class ReversibleSequence(Budgeted, BlockList):
    """A stack of invertible blocks that trains without storing the activations between them.

    It is a subclass of `nn.Sequential`. The backward pass recomputes the input to each block from the block's output. After the
    forward pass, only the output of the sequence remains in memory, at any depth. (For a gated block, one stream is also stored.)
    Each conditioner is evaluated twice per training step, so a step takes about 4/3 as long as under standard autograd.

    Args:
        blocks: Couplings, other bijections, or any modules with `forward(*streams, **context)` and
            `inverse(*streams, **context)`. To name blocks, pass a dictionary. Nested sequences are treated as lists of blocks.
        split_dim: Dimension along which a single tensor is split in half.
        guard: Reaction to recomputed values that differ from those of the forward pass. A few values per block are compared. In
            "warn" mode, a warning is shown once per sequence if an error exceeds 1e-4 of the largest stream in float32 (2e-2
            under autocast). Above 1e-2 (1e-1 under autocast), a `ReconstructionError` is raised. In "raise" mode, this error is
            raised above the lower tolerance. "off" disables the comparison. If `exact` is set, any difference is an error.
        exact: True to round streams to a grid of 16 bits, or a different `Grid`. Recomputed values and all gradients are then
            bit-identical to those computed with stored activations. (One exception: if a tensor is used several times in a block
            and also in other blocks, its gradients are summed in a different order.) The input, and everything that a conditioner
            adds to a stream, is rounded to the grid, including in `plain` and in inference. The derivative of rounding is treated
            as 1. For a coupling that is not additive, one byte per value is stored, plus four bytes for each value that is almost
            completely overwritten (gates above 0.996).
        memory_budget: Memory for activations: a number of bytes, a size such as "6GiB", a fraction such as 0.8 of the device's
            free memory (at the first call), "min" (recompute all), "max" (store all), or a `Budget` that several modules share.
            The last blocks are stored. Of others, the conditioners' outputs are stored, and their second evaluation stops early.
            The rest is recomputed, as is everything in the first step with a new kind of input (shapes, dtypes, autocast, mode),
            which measures. To predict the result, use `plan`. All calls with a pending backward pass share the budget. It
            includes gradients of streams, but not those of the input and the parameters. A budget below the need acts as "min",
            with a warning. Inside `torch.utils.checkpoint` and `save_on_cpu`, all blocks are recomputed.
        chunks: Number of micro-batches, along dimension 0, in which a recomputed conditioner is evaluated. Only the activations
            of one micro-batch are then in memory at a time. The results are the same except for rounding and the order in which
            random numbers are drawn. State that changes in each evaluation (spectral-norm vectors, running averages) changes once
            per micro-batch. Tensors among the keyword arguments are also split, so the size of their first dimension must be the
            batch size or 1. Conditioners that mix samples (such as BatchNorm in train mode) cause an error. If `guard` is "off",
            only BatchNorm causes an error.

    If the input is a single tensor, it is split into two streams along `split_dim`, and the output is a single tensor. If the
    input is a tuple of streams, the output is a tuple. Keyword arguments are passed to every conditioner. Tensors among them,
    including those in lists or dictionaries, receive gradients. Dropout masks, autocast settings, train or eval mode and
    BatchNorm statistics are the same in both evaluations. Do not change parameters, keyword arguments or the output in place
    before the backward pass; otherwise, PyTorch raises an error. Under `no_grad`, forward-mode differentiation, `torch.func`
    transforms and `torch.export`, a sequence runs like any other module. Under `torch.compile`, it becomes part of the compiled
    graph, if its conditioners draw no random numbers and change no state.

    `print(net)` prints a table of the blocks, with identical consecutive blocks on one line. The table lists parameter counts
    and the output stream shapes from the last training step or `plan` call. `print(net[0])` prints the modules of a block.

    Raises:
        TypeError, ValueError, RuntimeError: If an argument, a block or its result is invalid, or if second derivatives are
            computed (`plain` supports them). The message of an error in a block contains the block's number and stream shapes.
        OverflowError: If `exact` is set and a stream exceeds the range of the grid. The message names the block.

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
        memory_budget: MemoryBudget | Budget = "min",
        chunks: int = 1,
    ) -> None:
        super().__init__(blocks)
        self.split_dim = split_dim
        if not isinstance(exact, (bool, Grid)):
            raise TypeError(f"exact must be True, False or a revflow.Grid; got {exact!r}")
        self._grid = Grid() if exact is True else exact or None
        self._guard = Guard(guard, exact=self._grid is not None)
        self.memory_budget = memory_budget
        self.chunks = chunks
        self._shapes: dict[str, list[torch.Size]] = {}
        """By block: the shapes of its output streams, for the repr."""

    @property
    def chunks(self) -> int:
        """Number of micro-batches in which a recomputed conditioner is evaluated."""
        return self._chunks

    @chunks.setter
    def chunks(self, chunks: int) -> None:
        if type(chunks) is not int or chunks < 1:
            raise ValueError(f"chunks must be a whole number of at least 1; got {chunks!r}")
        self._chunks = chunks

    @property
    def exact(self) -> Grid | Literal[False]:
        """The grid of exact arithmetic, or False if `exact` is not set."""
        return self._grid or False

    def forward(self, x: Tensor | Streams, **context: Any) -> Any:  # type: ignore[override]
        """Return the output of the last block: a tensor if `x` is a tensor, or a tuple if `x` is a tuple of streams."""
        return self._run(x, context)[0]

    def inverse(self, y: Tensor | Streams, **context: Any) -> Any:
        """Return the input that `forward` maps to `y`. Like `forward`, this method is differentiable and saves memory."""
        return self._run(y, context, INVERSE)[0]

    def forward_with_log_det(self, x: Tensor | Streams, **context: Any) -> tuple[Any, Tensor]:
        """Return the output y and, for normalizing flows, log |det dy/dx|, which has one value per sample: shape (batch,).

        The log-determinant is differentiable and requires no additional evaluation. Custom couplings must define
        `log_derivative`, and other custom blocks must define `log_det`. Otherwise, a NotImplementedError names the block.
        """
        y, log_det = self._run(x, context, log_det=True)
        return y, log_det

    def plain(self, x: Tensor | Streams, **context: Any) -> Any:
        """Run `forward` under standard autograd, which stores every activation. The function and parameters are the same."""
        return self._chain(x, context).run()[0]

    def forward_with_residuals(self, x: Tensor | Streams, **context: Any) -> tuple[Any, list[Residual]]:
        """Return the output of `plain(x)` and the residuals with which `inverse_with_residuals` recovers x bit for bit.

        For each conditioner of a coupling that is not additive, there is one `Residual`, with one byte per value. `inverse` uses
        no residuals: it is exact if all couplings are additive, and approximate otherwise. If `exact` is not set, a RuntimeError
        is raised.
        """
        residuals: list[Residual] = []
        y, _ = self._chain(x, context, residuals=self._checked_exact(residuals)).run()
        return y, residuals

    @torch.no_grad()
    def inverse_with_residuals(self, y: Tensor | Streams, residuals: Sequence[Residual], **context: Any) -> Any:
        """Recover the input to `forward_with_residuals`, rounded to the grid, from its results. No graph is built."""
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
        """Predict which blocks are stored in a training step with an input like `x`, and the memory and time of the step.

        The forward pass is run five times. Buffers and random number generators do not change, and nothing is trained. Each
        block's time is the median of three runs.
        """
        device = streams_of(x, self.split_dim)[0].device
        with torch.enable_grad(), undisturbed(self, device):
            chain = self._chain(x, context, tape=Tape(context, self.chunks))
            limit, menu, option = self._keeper.plan_of(chain)
        with torch.no_grad(), undisturbed(self, device):
            _, *runs = [self._chain(x, context).seconds() for _ in range(4)]  # The first one warms up.
        seconds = tuple(median(of_block) for of_block in zip(*runs, strict=True))
        return Plan(limit, menu.costs, *option.choice, option.peak, seconds)

    def compile_conditioners(self, **options: Any) -> ReversibleSequence:
        """Compile the conditioner of every coupling in place with `torch.compile(..., **options)`. Return the sequence.

        The engine is not part of the compiled graphs. Compile either all conditioners or none. If only one of a conditioner's two
        evaluations were compiled, dropout masks would differ. When dynamo's recompilation limit (8 per function) is reached, a
        function runs uncompiled. Therefore, this method increases the limit to the number that the sequence may require.
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
        options |= {"memory_budget": self.memory_budget} if self.memory_budget != "min" else {}
        options |= {"chunks": self.chunks} if self.chunks > 1 else {}
        more = "".join(f", {name}={value!r}" for name, value in options.items())
        return f'split_dim={self.split_dim}, guard="{self._guard.mode}"{more}'

    def _run(
        self, x: Tensor | Streams, context: dict[str, Any], direction: Direction = FORWARD, log_det: bool = False
    ) -> tuple[Any, Any]:
        if engine_applies() and not self._keeper.stores_all:
            refuse_replica(self)
            result = torch.compiler.is_compiling() and captured(self, x, self.split_dim, direction, log_det, context)
            return result or self._on_a_tape(x, context, direction, log_det)
        return self._chain(x, context, direction, log_det).run()

    @not_compiled("the engine of a ReversibleSequence runs outside of compiled graphs")
    def _on_a_tape(
        self, x: Tensor | Streams, context: dict[str, Any], direction: Direction, log_det: bool
    ) -> tuple[Any, Any]:
        tape = Tape(context, self.chunks, witness_of(self._guard))
        chain = self._chain(x, context, direction, log_det, tape)
        return self._keeper.run(chain) if self._keeper.is_limited else chain.run()

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
