"""One call of a chain of blocks: on a tape, under ordinary autograd, or first the one and then the other."""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from revflow._base.errors import NAMED, named
from revflow._base.stepwise import Stepwise
from revflow._base.streams import Context, Streams
from revflow._base.torch_private import FakeTensor, is_transformed
from revflow._budget.meter import Meter
from revflow._replay.surroundings import autocast_state
from revflow._rewind.blocks import CouplingCall, WholeBlockCall
from revflow._rewind.functions import applied, end, hold
from revflow._rewind.hooked import through_observed
from revflow._rewind.passage import Passage, is_bound
from revflow._rewind.plain import run_plainly, run_whole
from revflow.budget import Result, Table
from revflow.exact import Extent


class ChainCall:
    """A call that is about to be made, once."""

    def __init__(
        self,
        blocks: Sequence[tuple[str, nn.Module]],
        passage: Passage,
        streams: Streams,
        join: int | None,
        context: Context,
        shapes: dict[str, list[torch.Size]] | None = None,
    ) -> None:
        """`blocks` with their positions, in the order in which they run; `join`: the dimension along which the output's streams
        become one tensor, None where they do not; `shapes`: where to note those of the streams that each block makes."""
        self._blocks, self._passage, self._streams, self._join, self._context = blocks, passage, streams, join, context
        self._shapes = shapes

    @property
    def kind(self) -> Hashable:
        """What decides how much memory the call takes."""
        direction, _, log_det, tape = self._passage
        assert tape is not None
        given = (*self._streams, *tape.arguments.tensors)
        return (
            (direction, log_det, tape.chunks, tuple(autocast_state(self.device)), self._join is None),
            tuple([(t.shape, t.dtype, t.device, t.requires_grad) for t in given]),
            tape.arguments.switches,
            tuple([ref(block) for _, block in self._blocks]),  # an id may come to be another block's
            tuple([module.training for _, block in self._blocks for module in block.modules()]),
            tuple([p.requires_grad for _, block in self._blocks for p in block.parameters()]),
        )

    def run(self, first_kept: int | None = None, lifetime: Tensor | None = None) -> Result:
        """The output: one tensor where the streams are joined, else a tuple; and the log-determinant, if wanted.

        From the block of number `first_kept` on, ordinary autograd takes over; its graph then holds on to `lifetime`.
        """
        passage, streams, context = self._passage, self._streams, self._context
        self._streams = ()  # to be freed on the way
        if first_kept == 0:
            passage = passage._replace(tape=None)
        if is_bound(passage):
            # A dense copy: both runs of a conditioner shall see the same strides (clone keeps channels_last).
            streams = tuple([s if s.is_contiguous() else s.clone() for s in streams])
        streams, extent = passage.arithmetic.entered(streams), passage.arithmetic.extent
        log_dets: list[Tensor] = []
        node = None
        for k, (name, block) in enumerate(self._blocks):
            if k == first_kept and passage.tape is not None:
                passage, streams, log_dets = _kept_from_here(passage, streams, log_dets)
            if extent is not None:
                extent.source = name, block
            try:
                outputs = _through(passage, name, block, streams, node, context)
            except NAMED as error:
                raise named(error, f"block {name}", block, streams) from error
            if passage.log_det:
                log_dets.append(outputs[-1])
                outputs = outputs[:-1]
            streams = outputs
            if self._shapes is not None:
                self._shapes[name] = [s.shape for s in streams]
            node = None if passage.tape is None else streams[0].grad_fn
        if passage.tape is not None:
            passage.tape.draws.end()
        if extent is not None:
            _refuse_overflow(extent)
        total = _sum_of(log_dets, streams[0]) if passage.log_det else None
        streams, total = end(passage.tape, streams, self._join, total)
        if lifetime is not None:
            streams, total = hold(lifetime, streams, total)
        return (streams if self._join is None else streams[0]), total

    @property
    def device(self) -> torch.device:
        return self._streams[0].device

    def measured(self, lifetime: Tensor | None = None) -> tuple[Result, Table]:
        """What `run(None, lifetime)` returns, which rebuilds every block; and the peak of each schedule of such a call."""
        of_blocks = [t for _, block in self._blocks for t in (*block.parameters(), *block.buffers())]
        tape, is_exact = self._passage.tape, self._passage.arithmetic.is_exact
        assert tape is not None
        meter = tape.meter = Meter([*of_blocks, *tape.arguments.tensors])
        return self.run(None, lifetime), Table(meter.costs, self._join is not None, is_exact)

    def seconds(self) -> list[float]:
        """The time of each block's forward pass, without a tape."""
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
    """What a sequence is called with, as streams: halves of a tensor, or those of a tuple."""
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


def _kept_from_here(
    passage: Passage, streams: Streams, log_dets: list[Tensor]
) -> tuple[Passage, Streams, list[Tensor]]:
    """End the part of the chain that is on the tape."""
    assert passage.tape is not None
    passage.tape.draws.end()
    total = _sum_of(log_dets, streams[0]) if log_dets else None
    streams, total = end(passage.tape, streams, None, total, kept_follow=True)
    return passage._replace(tape=None), streams, [] if total is None else [total]


def _refuse_overflow(extent: Extent) -> None:
    outgrown = extent.outgrown()
    if outgrown is not None:
        source, message = outgrown
        if source is None:
            raise OverflowError(f"the input {message}")
        name, block = source
        raise OverflowError(f"the output of block {name} ({type(block).__name__}) {message}")


def values_are_hidden(streams: Streams) -> bool:
    """Whether they cannot be looked at: in a graph that is being captured, under torch.func's transforms, or fake."""
    return torch.compiler.is_compiling() or is_transformed() or any(isinstance(s, FakeTensor) for s in streams)


def _sum_of(log_dets: list[Tensor], stream: Tensor) -> Tensor:
    return sum(log_dets[1:], log_dets[0]) if log_dets else stream.new_zeros(len(stream))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _through(
    passage: Passage, position: str, block: nn.Module, streams: Streams, before: Any, context: Context
) -> Streams:
    """Pass `streams` through the chain's block at that `position`; `before` is the autograd node of the block before it."""
    if not isinstance(block, Stepwise):
        if passage.tape is None:
            return run_whole(block, passage, streams, context)
        return applied(WholeBlockCall(passage, position, block, before, streams), streams)
    if block.unobserved:
        if passage.tape is None:
            return run_plainly(block, passage, streams, context)
        return applied(CouplingCall(passage, position, block, before, streams), streams)
    return through_observed(passage, position, block, streams, before, context)
