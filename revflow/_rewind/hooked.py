"""Blocks with hooks: they are called as modules, so that their hooks run.

`through_observed` offers the engine's pass to the block in a variable of the thread, and calls the block. The call runs the
block's pre-hooks, then its `forward` (`coupling.py`), then its hooks. `forward` calls `run_stepwise`, which takes the offer and
makes the pass. If no offer is there, a user has called the block, which then runs under standard autograd.
"""

from __future__ import annotations

import operator
import threading
from typing import Any
from weakref import ref

from torch import Tensor

from revflow._base.stepwise import Stepwise
from revflow._base.streams import Context, Streams, as_streams, versions_of
from revflow._rewind.blocks import BlockCall
from revflow._rewind.direction import Direction
from revflow._rewind.functions import applied
from revflow._rewind.laws import Law
from revflow._rewind.passage import Passage, is_bound
from revflow._rewind.plain import run_plainly


class _Offer:
    """A sequence's pass through a coupling that it is about to call, and the result of that pass."""

    def __init__(self, passage: Passage, position: str, block: Stepwise, streams: Streams, before: Any) -> None:
        self.passage, self.position, self.block, self.streams, self.before = passage, position, block, streams, before
        self.versions = versions_of(streams)
        """Of `streams`, and then of the result: hooks must not change them in place."""
        self.results: Streams = ()


_thread = threading.local()


def through_observed(
    passage: Passage, position: str, block: Stepwise, streams: Streams, before: Any, context: Context
) -> Streams:
    """The output of a block with hooks, which is called with an offer on the side."""
    offer = _thread.offer = _Offer(passage, position, block, streams, before)
    try:
        outputs = as_streams(passage.direction.method(block)(*streams, **context))
    finally:
        _thread.offer = None
    if passage.tape is not None:
        _remember(offer.results, outputs)
    if is_bound(passage) and not _same(outputs, offer.results[: len(outputs)], offer.versions):
        raise RuntimeError(
            "a hook replaced its output, or called the block itself, which cannot be inverted; make that a block"
        )
    return (*outputs, offer.results[-1]) if passage.log_det else outputs


def _remember(results: Streams, outputs: Streams) -> None:
    """Let a backward pass begin at this block, since a hook may store its output and a loss may depend only on that.

    The references are weak: a stream that the hook has not stored is freed.
    """
    node: Any = next((r.grad_fn for r in results if r.grad_fn is not None), None)
    if node is not None:
        node.outputs, node.versions = [ref(o) for o in outputs], versions_of(outputs)


def run_stepwise(block: Stepwise, direction: Direction, streams: Streams, context: Context) -> Streams:
    """A coupling's forward or inverse: the pass that a sequence offers, otherwise one under standard autograd."""
    offer: _Offer | None = getattr(_thread, "offer", None)
    if offer is None or offer.block is not block:
        return run_plainly(Law(block, Passage(direction)), streams, context)
    _thread.offer = None  # so that calls in the block's conditioners do not take it
    passage = offer.passage
    if is_bound(passage) and not _same(streams, offer.streams, offer.versions):
        raise RuntimeError("a forward pre-hook replaced its input, which cannot be inverted; make that change a block")
    law = Law(block, passage)
    if passage.tape is None:
        offer.results = run_plainly(law, streams, context)
    else:
        offer.results = applied(BlockCall(passage, offer.position, block, law, offer.before, streams), streams)
    offer.versions = versions_of(offer.results[: len(streams)])
    return offer.results[: len(streams)]


def _same(streams: Streams, expected: Streams, versions: list[int]) -> bool:
    """Whether these are the expected tensors or aliases of them, and were not changed in place."""
    return (
        len(streams) == len(expected)
        and (all(map(operator.is_, streams, expected)) or all(map(_is_alias, streams, expected)))
        and versions_of(streams) == versions
    )


def _is_alias(a: Tensor, b: Tensor) -> bool:
    """FSDP2 replaces the inputs and outputs of a module by aliases."""
    return (
        a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
        and a.requires_grad == b.requires_grad
    )
