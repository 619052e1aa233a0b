"""One call of a sequence of blocks: on a tape, under standard autograd, or first the one and then the other."""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from revflow._base.errors import BLOCK_ERRORS, with_place
from revflow._base.stepwise import Stepwise
from revflow._base.streams import Context, Streams
from revflow._base.torch_private import FakeTensor, is_transformed
from revflow._budget.costs import Choice, SequenceMenu
from revflow._budget.kinds import fingerprint, flags_of
from revflow._budget.meter import Meter
from revflow._replay.autocast import autocast_state
from revflow._rewind.arithmetic import OnGrid
from revflow._rewind.blocks import BlockCall
from revflow._rewind.functions import applied, end, hold
from revflow._rewind.hooked import through_observed
from revflow._rewind.laws import Law
from revflow._rewind.passage import Passage, is_bound
from revflow._rewind.plain import run_plainly, run_whole, total
from revflow.exact import Extent

Result = tuple[Any, Any]
"""The output of a call, a tensor or a tuple of streams, and the log-determinant or None."""


class ChainCall:
    """One call of a sequence, prepared to run once."""

    def __init__(
        self,
        blocks: Sequence[tuple[str, nn.Module]],
        passage: Passage,
        streams: Streams,
        join: int | None,
        context: Context,
        shapes: dict[str, list[torch.Size]] | None = None,
    ) -> None:
        """
        Args:
            blocks: with their positions, in the order in which they run.
            join: the dimension along which the output's streams are joined into one tensor; None if they are not.
            shapes: a dictionary in which to note the shapes of the streams that each block returns.
        """
        self._blocks, self._passage, self._streams, self._join, self._context = blocks, passage, streams, join, context
        self._shapes = shapes

    @property
    def kind(self) -> tuple[Hashable, ...]:
        """All that determines the memory use of the call."""
        direction, arithmetic, log_det, tape = self._passage
        assert tape is not None
        given = (*self._streams, *tape.arguments.tensors)
        way = direction.name, arithmetic.is_exact, log_det, self._join is None
        return (
            (*way, tape.chunks, tuple(autocast_state(self.device))),
            tuple([(t.shape, t.dtype, t.device, t.requires_grad) for t in given]),
            tape.arguments.switches,
            tuple([ref(block) for _, block in self._blocks]),  # not its id, which another block may get
            flags_of([block for _, block in self._blocks]),
        )

    def run(self, choice: Choice | None = None, lifetime: Tensor | None = None) -> Result:
        """The output, and the log-determinant if it is computed. Streams that are joined are one tensor, others a tuple.

        All blocks recompute if no choice is given. The graph holds `lifetime`.
        """
        first_stored, outputs_stored = choice or (None, frozenset())
        passage, streams, context = self._passage, self._streams, self._context
        self._streams = ()  # so that blocks can free them
        if first_stored == 0:
            passage = passage._replace(tape=None)
        if is_bound(passage):
            # Dense copies, so that both evaluations of a conditioner get the same strides; `clone` preserves channels_last.
            streams = tuple([s if s.is_contiguous() else s.clone() for s in streams])
        if isinstance(passage.arithmetic, OnGrid):
            streams = passage.arithmetic.entered(streams)
        extent = passage.arithmetic.extent
        log_dets: list[Tensor] = []
        node = None
        for k, (name, block) in enumerate(self._blocks):
            if k == first_stored and passage.tape is not None:
                passage, streams, log_dets = _without_tape(passage, streams, log_dets)
            if outputs_stored and passage.tape is not None:
                passage.tape.keeps_outputs = k in outputs_stored
            if extent is not None:
                extent.source = name, block
            try:
                outputs = _through(passage, name, block, streams, node, context)
            except BLOCK_ERRORS as error:
                raise with_place(error, f"block {name}", block, streams) from error
            if passage.log_det:
                log_dets.append(outputs[-1])
                outputs = outputs[:-1]
            streams = outputs
            if self._shapes is not None:  # for the sequence's repr
                self._shapes[name] = [s.shape for s in streams]
            node = None if passage.tape is None else streams[0].grad_fn
        return self._ended(passage, streams, log_dets, lifetime)

    def _ended(self, passage: Passage, streams: Streams, log_dets: list[Tensor], lifetime: Tensor | None) -> Result:
        """The result, after the last block has returned these streams."""
        if passage.tape is not None:
            passage.tape.draws.end()
        if passage.arithmetic.extent is not None:
            _refuse_overflow(passage.arithmetic.extent)
        outputs = (*streams, total(log_dets, streams[0])) if passage.log_det else streams
        outputs = end(passage.tape, outputs, len(streams), self._join)
        if lifetime is not None:
            outputs = hold(lifetime, outputs)
        streams, log_det = (outputs[:-1], outputs[-1]) if passage.log_det else (outputs, None)
        return (streams if self._join is None else streams[0]), log_det

    @property
    def device(self) -> torch.device:
        return self._streams[0].device

    @property
    def fingerprint(self) -> str:
        """As `kind`, in a text that is the same in another process."""
        options, given, switches, _, flags = self.kind
        return fingerprint((options, given, switches, flags), [block for _, block in self._blocks])

    @property
    def label(self) -> str:
        """The call's name in a printed plan."""
        return f"{self._passage.direction.name}, {len(self._blocks)} blocks"

    def measured(self, lifetime: Tensor | None = None) -> tuple[Result, SequenceMenu]:
        """The result of `run(None, lifetime)`, which recomputes all blocks, and the options whose costs it measured."""
        of_blocks = [t for _, block in self._blocks for t in (*block.parameters(), *block.buffers())]
        tape, is_exact = self._passage.tape, self._passage.arithmetic.is_exact
        assert tape is not None
        meter = tape.meter = Meter([*of_blocks, *tape.arguments.tensors])
        return self.run(None, lifetime), SequenceMenu(meter.costs, self._join is not None, is_exact)

    def seconds(self) -> list[float]:
        """The time of each block's forward pass, in seconds, without a tape."""
        streams, self._streams = self._streams, ()
        times = []
        for name, block in self._blocks:
            began = _now(streams[0].device)
            streams = _through(self._passage, name, block, streams, None, self._context)
            times.append(_now(streams[0].device) - began)
            if self._passage.log_det:
                streams = streams[:-1]
        return times


def streams_of(x: Tensor | Streams, split_dim: int) -> Streams:
    """The streams of a sequence's input: the halves of a tensor, or the tensors of a tuple."""
    if isinstance(x, Tensor):
        if not -x.dim() <= split_dim < x.dim():
            raise ValueError(f"ReversibleSequence splits dimension {split_dim}; the input has shape {tuple(x.shape)}")
        if x.shape[split_dim] % 2:
            raise ValueError(
                f"ReversibleSequence splits dimension {split_dim} in halves; it has {x.shape[split_dim]} entries, an odd "
                f"number, in an input of shape {tuple(x.shape)}. Unshuffle or pad the input first, or pass a tuple of streams"
            )
        return x.chunk(2, split_dim)
    if not (isinstance(x, tuple) and x and all(isinstance(s, Tensor) for s in x)):
        raise TypeError(f"ReversibleSequence takes a tensor or a tuple of streams; got a {type(x).__name__}")
    return x


def _without_tape(passage: Passage, streams: Streams, log_dets: list[Tensor]) -> tuple[Passage, Streams, list[Tensor]]:
    """End the recomputed part of a sequence; the blocks that follow run under standard autograd."""
    assert passage.tape is not None
    passage.tape.draws.end()
    outputs = (*streams, total(log_dets, streams[0])) if log_dets else streams
    outputs = end(passage.tape, outputs, len(streams), None, stored_follow=True)
    return passage._replace(tape=None), outputs[: len(streams)], [*outputs[len(streams) :]]


def _refuse_overflow(extent: Extent) -> None:
    outgrown = extent.outgrown()
    if outgrown is not None:
        source, message = outgrown
        if source is None:
            raise OverflowError(f"the input {message}")
        name, block = source
        raise OverflowError(f"the output of block {name} ({type(block).__name__}) {message}")


def values_are_hidden(streams: Streams) -> bool:
    """Whether values are unavailable: while a graph is captured, under torch.func's transforms, or of fake tensors."""
    return torch.compiler.is_compiling() or is_transformed() or any(isinstance(s, FakeTensor) for s in streams)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _through(
    passage: Passage, position: str, block: nn.Module, streams: Streams, before: Any, context: Context
) -> Streams:
    """The output of the block at that `position`; `before` is the autograd node of the block before it."""
    if not isinstance(block, Stepwise):
        if passage.tape is None:
            return run_whole(block, passage, streams, context)
        return applied(BlockCall(passage, position, block, None, before, streams), streams)
    if not block.unobserved:
        return through_observed(passage, position, block, streams, before, context)
    law = Law(block, passage)
    if passage.tape is None:
        return run_plainly(law, streams, context)
    return applied(BlockCall(passage, position, block, law, before, streams), streams)
