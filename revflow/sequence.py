"""ReversibleSequence: a chain of invertible blocks that trains without storing what happens between them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any, Literal, Self, overload

import torch
from torch import Tensor, nn

from revflow._base.bytes import MemoryBudget
from revflow._base.stepwise import Stepwise
from revflow._base.streams import Streams
from revflow._base.table import number_of_parameters, table
from revflow._base.torch_private import allow_recompilations
from revflow._guard.chains import witness_of
from revflow._guard.policy import Guard, Mode
from revflow._replay.mode import engine_applies, refuse_replica
from revflow._replay.undisturbed import undisturbed
from revflow._rewind.arithmetic import FLOATING, OnGrid
from revflow._rewind.chain import ChainCall, streams_of, values_are_hidden
from revflow._rewind.direction import FORWARD, INVERSE, Direction
from revflow._rewind.passage import Passage
from revflow._rewind.tape import Tape
from revflow.budget import Budget, Plan
from revflow.coupling import Coupling
from revflow.exact import Extent, Grid, Residual

# A compiled forward pass would draw other dropout masks than the rerun. Whole-graph capture shows the reason, where
# PyTorch can (2.7 and later).
_REASON = {
    "reason": "a ReversibleSequence in training runs outside of compiled graphs, so that its two evaluations agree: leave out "
    "fullgraph=True, and call net.compile_conditioners() to compile what takes the time"
}
if "reason" not in inspect.signature(torch.compiler.disable).parameters:
    _REASON = {}


class ReversibleSequence(nn.Sequential):
    """A chain of invertible blocks, to be used like `nn.Sequential`.

    In training nothing between the blocks is stored: the backward pass rebuilds each block's input from its output. What
    stays alive after the forward pass is the output, however many blocks there are (a gated block keeps one stream). Each
    conditioner runs twice a training step, so a step costs about 4/3 of an ordinary one.

    Args:
        blocks: couplings, bijections, or any modules with `forward(*streams, **context)` and `inverse(*streams, **context)`,
            in a dictionary if they shall have names. A ReversibleSequence among them counts as its blocks.
        split_dim: where a single tensor is split in halves.
        guard: what to do where the backward pass rebuilds something else than the forward pass saw, by a few values of each
            block: "warn" from a first tolerance on (1e-4 of the largest stream in float32, 2e-2 under autocast), once a
            sequence, and raise `ReconstructionError` from a second one (1e-2, 1e-1); "raise" from the first; or "off". With
            `exact`, any bit that differs is an error.
        exact: whether the streams live on a grid, so that what is rebuilt, and every gradient, is what stored activations
            would give, to the last bit; True, or a `Grid` (True is one of 16 bits). (Of a tensor that is used several times
            within a block and in other blocks too, gradients are summed in another order.) The input, and whatever a conditioner
            adds, is rounded to the grid, here as in `plain` and in inference, with the gradient passing straight through.
            Couplings that do more than add keep one byte a value, and four more of those that are all but overwritten (gates
            above 0.996). OverflowError names the block whose output outgrows the
            grid's range.
        memory_budget: what activations may take: bytes, a size as "6GiB", a share of the device's free memory as 0.8 (of
            what is free when it is first needed), "all" or "none". Activations of as many blocks as fit are kept, the last
            ones; the others are rebuilt. The first step with inputs of another kind (shapes, dtypes, autocast, mode)
            rebuilds everything and measures; `plan` tells what comes of it. The budget is for all calls whose backward
            pass is still to come: how many there are at a time, the first step with so many shows. Streams' gradients are
            in it, the input and parameters' gradients are not. Where even rebuilding takes more, a warning says so. Within
            `torch.utils.checkpoint` and `save_on_cpu` all blocks are rebuilt.
        chunks: in how many slices of the batch (dimension 0) to run a conditioner that will be rerun: its own activations are
            then those of a slice. The same function, up to rounding and the order in which random numbers are drawn; what a
            conditioner moves at each evaluation (spectral norm's vectors, running averages), it moves once a slice. Tensors
            among the keyword arguments are sliced too: their first dimension has to be the batch's, or of size 1. A
            conditioner that mixes samples (BatchNorm in train mode) is refused, unless `guard` is "off": then BatchNorm alone.

    Called with a tensor, it splits it in two streams along `split_dim`, and returns one tensor; called with a tuple of
    streams it returns a tuple. Keyword arguments reach every block's conditioners; tensors among them, in lists or
    dictionaries too, get gradients. Under `no_grad`, forward-mode differentiation, `torch.func`'s transforms and
    `torch.export` it runs as ordinary modules do. Dropout, autocast, train/eval mode and BatchNorm's statistics are the same
    in both runs. Parameters, context and the output must not change in place before the backward pass: PyTorch's error says
    so.

    Printed, it is a table of its blocks, runs of equal ones in one line, with their parameters and the shapes of the streams
    that each made when it last ran in training, or in `plan`. `print(net[0])` shows what is inside of one.

    Raises ValueError, TypeError or RuntimeError with the block's number and the shapes of its streams; second derivatives
    are refused (`plain` has them).

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
        super().__init__()
        if isinstance(blocks, nn.Module) and not isinstance(blocks, Iterable):
            kind = type(blocks).__name__
            raise TypeError(
                f"ReversibleSequence takes a list of blocks, ReversibleSequence([a, b]); got one {kind} by itself"
            )
        for name, block in blocks.items() if isinstance(blocks, Mapping) else enumerate(blocks):
            self.add_module(str(name), block)
        self.split_dim = split_dim
        if not isinstance(exact, (bool, Grid)):
            raise TypeError(f"exact has to be True, False or a revflow.Grid; got {exact!r}")
        self._grid = Grid() if exact is True else exact or None
        self._guard = Guard(guard, exact=self._grid is not None)
        self._budget = Budget(memory_budget)
        self.chunks = chunks
        self._shapes: dict[str, list[torch.Size]] = {}
        """For the repr alone."""

    @property
    def memory_budget(self) -> MemoryBudget:
        """As it was given. Setting it forgets what was measured."""
        return self._budget.given

    @memory_budget.setter
    def memory_budget(self, budget: MemoryBudget) -> None:
        self._budget = Budget(budget)

    @property
    def chunks(self) -> int:
        """In how many slices of the batch a conditioner runs that will be rerun."""
        return self._chunks

    @chunks.setter
    def chunks(self, chunks: int) -> None:
        if type(chunks) is not int or chunks < 1:
            raise ValueError(f"chunks has to be a whole number, 1 or more; got {chunks!r}")
        self._chunks = chunks

    @property
    def exact(self) -> Grid | Literal[False]:
        """The grid of exact arithmetic, or False."""
        return self._grid or False

    def forward(self, x: Tensor | Streams, **context: Any) -> Any:  # type: ignore[override]
        """The chain's output: a tensor for a tensor, a tuple for a tuple of streams."""
        return self._run(x, context)[0]

    def inverse(self, y: Tensor | Streams, **context: Any) -> Any:
        """The input that `forward` maps to `y`: differentiable, and as frugal as forward."""
        return self._run(y, context, INVERSE)[0]

    def forward_with_log_det(self, x: Tensor | Streams, **context: Any) -> tuple[Any, Tensor]:
        """The chain's output and log |det dy/dx|, one value a sample (the first dimension), for normalizing flows.

        The log-determinant is differentiable and costs no further evaluation. Blocks of your own need `log_derivative`
        (couplings) or `log_det` (bijections); NotImplementedError names the block that has none.
        """
        y, log_det = self._run(x, context, log_det=True)
        return y, log_det

    def plain(self, x: Tensor | Streams, **context: Any) -> Any:
        """`forward` under ordinary autograd, which stores every activation: the same function, the same parameters."""
        return self._chain(x, context).run()[0]

    def forward_with_residuals(self, x: Tensor | Streams, **context: Any) -> tuple[Any, list[Residual]]:
        """In exact arithmetic: `plain(x)`, and what `inverse_with_residuals` needs to make x of it to the last bit.

        One `Residual` for each conditioner whose coupling does more than add: a byte a value. `inverse` does without them:
        it is exact where all couplings add, and approximate elsewhere. RuntimeError unless the sequence is exact.
        """
        residuals: list[Residual] = []
        y, _ = self._chain(x, context, residuals=self._checked_exact(residuals)).run()
        return y, residuals

    @torch.no_grad()
    def inverse_with_residuals(self, y: Tensor | Streams, residuals: Sequence[Residual], **context: Any) -> Any:
        """The x, rounded to the grid, of which `forward_with_residuals` has made `y` and these residuals; without a graph."""
        left = self._checked_exact(list(residuals))
        x, _ = self._chain(y, context, INVERSE, residuals=left).run()
        if left:
            raise ValueError(
                f"{len(residuals)} residuals were given, and {len(left)} not used: they are of another sequence"
            )
        return x

    def _checked_exact(self, residuals: list[Residual]) -> list[Residual]:
        if self._grid is None:
            raise RuntimeError("residuals belong to exact arithmetic: make the sequence with exact=True")
        return residuals

    def plan(self, x: Tensor | Streams, **context: Any) -> Plan:
        """What a training step on such an input keeps and what it rebuilds, with the bytes and the time to expect.

        Runs the forward pass five times, measures it, and leaves buffers and random numbers as they were; nothing is trained.
        A block's time is the median of three runs.
        """
        device = streams_of(x, self.split_dim)[0].device
        with torch.enable_grad(), undisturbed(self, device):
            chain = self._chain(x, context, tape=Tape(context, self.chunks))
            limit, table, first_kept = self._budget.schedule(chain)
        with torch.no_grad(), undisturbed(self, device):
            _, *runs = [self._chain(x, context).seconds() for _ in range(4)]  # the first one warms up
        seconds = tuple(median(of_block) for of_block in zip(*runs, strict=True))
        return Plan(limit, table.costs, first_kept, table.peaks[first_kept], seconds)

    def compile_conditioners(self, **options: Any) -> ReversibleSequence:
        """Compile the conditioner of every coupling, in place, by `torch.compile(..., **options)`; returns the sequence.

        The engine itself stays out of compiled graphs. Compile all of a network or none of it: both evaluations of a
        conditioner have to be of one kind, or dropout draws another mask in the second. So this raises dynamo's limit of
        recompilations (8 for a class) to what the sequence needs.
        """
        conditioners = {
            conditioner
            for block in self.modules()
            if isinstance(block, Stepwise)
            for conditioner in block.children()
            if not any(isinstance(m, ReversibleSequence) for m in conditioner.modules())  # those inside are compiled
        }
        # Each shape of streams takes two graphs, with gradients and without, in train mode and in eval mode.
        allow_recompilations(4 * len(conditioners) + 8)
        for conditioner in conditioners:
            conditioner._compiled_call_impl = torch.compile(_call_of(conditioner), **options)
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

    # nn.Sequential's own methods for append, extend, += and *= come to add_module.
    def add_module(self, name: str, module: nn.Module | None) -> None:
        super().add_module(name, _checked(name, module))

    def insert(self, index: int, module: nn.Module) -> Self:
        super().insert(index, _checked(index, module))
        return self

    def __setitem__(self, index: int, module: nn.Module) -> None:
        super().__setitem__(index, _checked(index, module))

    def __add__(self, other: nn.Sequential) -> ReversibleSequence:
        if isinstance(other, ReversibleSequence) and other.split_dim != self.split_dim:
            raise ValueError(f"cannot add sequences that split dimensions {self.split_dim} and {other.split_dim}")
        if isinstance(other, ReversibleSequence) and other.exact != self.exact:
            raise ValueError(f"cannot add sequences with exact={self.exact} and exact={other.exact}")
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
        lines = table(_flattened(self), self._shapes, number_of_parameters(self))
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
            return self._on_a_tape(x, context, direction, log_det)  # type: ignore[no-any-return]
        return self._chain(x, context, direction, log_det).run()

    @torch.compiler.disable(**_REASON)  # type: ignore[untyped-decorator]
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
        """A call: on a tape, or under ordinary autograd."""
        streams = streams_of(x, self.split_dim)
        arithmetic = FLOATING
        if self._grid is not None:
            arithmetic = OnGrid(self._grid, None if values_are_hidden(streams) else Extent(self._grid), residuals)
        passage = Passage(direction, arithmetic, log_det, tape)
        blocks = self._blocks()
        join = self.split_dim if isinstance(x, Tensor) else None
        shapes = self._shapes if tape is not None and direction is FORWARD else None
        return ChainCall(blocks[:: direction.sign], passage, streams, join, context, shapes)

    def _blocks(self) -> list[tuple[str, nn.Module]]:
        """(name, block), with the blocks of sequences among them in their place."""
        self._refuse_what_would_not_count()
        return [*_flattened(self)]

    def _refuse_what_would_not_count(self) -> None:
        """Of sequences among the blocks: hooks, a forward of their own, and options."""
        for name, block in self._modules.items():
            if isinstance(block, ReversibleSequence):
                if type(block).forward is not ReversibleSequence.forward or _hooks(block):
                    raise RuntimeError(
                        f"block {name} is a ReversibleSequence with hooks or a forward of its own, which would not be called: "
                        f"here it only stands for its blocks"
                    )
                for option, default in (("exact", None), ("memory_budget", "none"), ("chunks", 1)):
                    its, own = getattr(block, option), getattr(self, option)
                    if its not in (own, default):
                        raise RuntimeError(
                            f"block {name} is a ReversibleSequence with {option}={its!r} in one with {option}={own!r}: here "
                            f"it only stands for its blocks, so give it to the outer one"
                        )
                block._refuse_what_would_not_count()


def _flattened(sequence: ReversibleSequence) -> Iterator[tuple[str, nn.Module]]:
    """(name, block), with the blocks of sequences among them in their place."""
    for name, block in sequence._modules.items():
        if isinstance(block, ReversibleSequence):
            yield from ((f"{name}.{inner}", b) for inner, b in _flattened(block))
        elif block is not None:
            yield name, block


def _checked(name: str | int, block: object) -> nn.Module:
    if isinstance(block, Coupling):
        own = [p for p, _ in block.named_parameters() if p.split(".")[0] not in ("F", "G")]
        if own:
            raise TypeError(
                f"block {name} ({type(block).__name__}) has a parameter of its own, {own[0]}, which combine and separate would "
                f"use without giving it a gradient: let the conditioner return it as a coefficient"
            )
    if isinstance(block, nn.Module) and callable(getattr(block, "inverse", None)):
        return block
    raise TypeError(
        f"block {name} has to be a module with forward and inverse; got a {type(block).__name__}. "
        f"A residual function F becomes a block as revflow.AdditiveCoupling(F)"
    )


def _hooks(module: nn.Module) -> bool:
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def _call_of(module: nn.Module) -> Callable[..., Any]:
    # nn.Module.compile compiles nothing of an nn.Sequential: dynamo begins at no frame of torch's own. It begins here.
    def call(*inputs: Any, **context: Any) -> Any:
        return module._call_impl(*inputs, **context)

    return call
