"""One pass through a block under standard autograd."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from revflow._base.streams import Context, Streams, as_streams, rotate
from revflow._rewind.direction import Direction
from revflow._rewind.laws import Law
from revflow._rewind.passage import Passage


def run_plainly(law: Law, streams: Streams, context: Context) -> Streams:
    """A coupling's output."""
    block, is_exact = law.block, law.arithmetic.is_exact
    before, after = law.rotations
    now, log_dets = rotate([*streams], before), []
    for k, conditioner in block.conditioners(streams)[:: law.direction.sign]:
        x = now[k]
        t = block.evaluate(conditioner, x, now[:k] + now[k + 1 :], context)
        now[k] = law.applied_exactly(x, t) if is_exact else law.apply(x, *t)
        if law.computes_log_det:
            log_dets.append(law.log_det(x, now[k], t))
    now = rotate(now, after)
    return (*now, total(log_dets, now[0])) if log_dets else tuple(now)


def run_whole(block: nn.Module, passage: Passage, streams: Streams, context: Context) -> Streams:
    """The output of any other block."""
    return settled(passage, call_whole(block, passage.direction, passage.log_det, streams, context))


def settled(passage: Passage, outputs: Streams) -> Streams:
    """A block's streams in the call's arithmetic; a log-determinant stays as it is."""
    arithmetic = passage.arithmetic
    if not arithmetic.is_exact:
        return outputs
    count = len(outputs) - passage.log_det
    rounded = tuple(map(arithmetic.round, outputs[:count]))
    if arithmetic.extent is not None:
        for stream in rounded:
            arithmetic.extent.see(stream)
    return rounded + outputs[count:]


def call_whole(block: nn.Module, direction: Direction, log_det: bool, streams: Streams, context: Context) -> Streams:
    """The streams that the block returns, and its log-determinant if that is computed."""
    outputs = as_streams(direction.method(block)(*streams, **context))
    if not log_det:
        return outputs
    method: Callable[..., Tensor] | None = getattr(block, "log_det", None)
    if method is None:
        raise NotImplementedError(f"a {type(block).__name__} has no log-determinant: write its method log_det")
    value = method(*streams, **context) if direction.sign > 0 else -method(*outputs, **context)
    if value.shape != streams[0].shape[:1]:
        raise ValueError(
            f"log_det must return one value per sample; it returned a tensor of shape {tuple(value.shape)}"
        )
    return (*outputs, value)


def total(log_dets: list[Tensor], stream: Tensor) -> Tensor:
    """Their sum; zeros, one per sample of the stream, if there are none."""
    return sum(log_dets[1:], log_dets[0]) if log_dets else stream.new_zeros(len(stream))
