"""Call a block as the module that it is, where somebody has hooks on it."""

from __future__ import annotations

import operator
import threading
from typing import Any
from weakref import ref

from torch import Tensor

from revflow._base.stepwise import Stepwise
from revflow._base.streams import Context, Streams, as_streams, versions_of
from revflow._rewind.blocks import CouplingCall
from revflow._rewind.direction import Direction
from revflow._rewind.functions import applied
from revflow._rewind.passage import Passage, is_bound
from revflow._rewind.plain import run_plainly


class _Offer:
    """What a chain wishes of the stepwise block that it is about to call, and what the block has made of it."""

    def __init__(self, passage: Passage, position: str, block: object, streams: Streams, before: Any) -> None:
        self.passage, self.position, self.block, self.streams, self.before = passage, position, block, streams, before
        self.versions = versions_of(streams)
        self.results: Streams = ()


_thread = threading.local()


def through_observed(
    passage: Passage, position: str, block: Stepwise, streams: Streams, before: Any, context: Context
) -> Streams:
    """A block on which somebody has hooks is called as any module is, with an offer on the side: the Function is applied inside
    its own forward, so that its hooks see an ordinary module."""
    offer = _thread.offer = _Offer(passage, position, block, streams, before)
    try:
        outputs = as_streams(passage.direction.method(block)(*streams, **context))
    finally:
        _thread.offer = None
    if passage.tape is not None:
        _remember(offer.results, outputs)
    if is_bound(passage) and not _same(outputs, offer.results[: len(outputs)], offer.versions):
        raise RuntimeError(
            "a hook replaced its output, or called the block itself, which cannot be undone; make that a block"
        )
    return (*outputs, offer.results[-1]) if passage.log_det else outputs


def _remember(results: Streams, outputs: Streams) -> None:
    """Let a backward pass begin at this block: a hook may keep its output, and a loss be computed from that alone.

    Nothing is held: streams that the hook has not kept are gone.
    """
    node: Any = next((r.grad_fn for r in results if r.grad_fn is not None), None)
    if node is not None:
        node.outputs, node.versions = [ref(o) for o in outputs], versions_of(outputs)


def run_stepwise(block: Stepwise, direction: Direction, streams: Streams, context: Context) -> Streams:
    """A stepwise block's forward or inverse: as a chain that has just called it wishes, else under ordinary autograd."""
    offer: _Offer | None = getattr(_thread, "offer", None)
    if offer is None or offer.block is not block:
        return run_plainly(block, Passage(direction), streams, context)
    _thread.offer = None  # whatever the block's conditioners call is no part of this chain
    passage = offer.passage
    if is_bound(passage) and not _same(streams, offer.streams, offer.versions):
        raise RuntimeError("a forward pre-hook replaced its input, which cannot be undone; make that change a block")
    if passage.tape is None:
        offer.results = run_plainly(block, passage, streams, context)
    else:
        offer.results = applied(CouplingCall(passage, offer.position, block, offer.before, streams), streams)
    offer.versions = versions_of(offer.results[: len(streams)])
    return offer.results[: len(streams)]


def _same(streams: Streams, expected: Streams, versions: list[int]) -> bool:
    """Whether these are the expected values: the tensors themselves or aliases of them, and not changed in place."""
    return (
        len(streams) == len(expected)
        and (all(map(operator.is_, streams, expected)) or all(map(_is_alias, streams, expected)))
        and versions_of(streams) == versions
    )


def _is_alias(a: Tensor, b: Tensor) -> bool:
    """FSDP2 wraps what goes through a module in aliases."""
    return (
        a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
        and a.requires_grad == b.requires_grad
    )
