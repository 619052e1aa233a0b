"""What passes through a block: streams, context and gradients; and a block's pass under ordinary autograd.

A stepwise block (a coupling) is taken apart into steps, one a conditioner; any other is known by `forward` and `inverse`
alone. On a grid (exact arithmetic) the streams are rounded here as in the passes that are made to be undone (`blocks`).

Where the log-determinant is asked for, one value a sample follows a block's streams, and its gradient theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from revflow._base.stepwise import Stepwise
from revflow._base.streams import Context, Streams, as_streams, described, rotate
from revflow._budget.meter import Meter
from revflow._replay.arguments import Arguments
from revflow._replay.random_states import Draws
from revflow._rewind.tape import Tape
from revflow.exact import Extent, Grid, Residual


class Passage(NamedTuple):
    """One call of a chain: what is the same for all of its blocks."""

    inverse: bool
    log_det: bool
    """Whether each block's log-determinant is wanted, behind its streams."""
    arguments: Arguments
    draws: Draws
    tape: Tape | None = None
    """None under ordinary autograd."""
    chunks: int = 1
    """Slices of the batch in which conditioners run that will be rerun."""
    meter: Meter | None = None
    """Measures what ordinary autograd would keep; None if that is known, or nobody asks."""
    grid: Grid | None = None
    """Where the streams live in exact arithmetic; the same under ordinary autograd."""
    extent: Extent | None = None
    """Sees that they stay within the grid's range."""
    residuals: list[Residual] | None = None
    """Without a tape: filled by a forward pass, last step last, and used up by an inverse one; None if not wanted."""


def is_built_in(block: object) -> bool:
    """Whether its class is revflow's own: then it uses nothing but its arguments."""
    return type(block).__module__.startswith("revflow.")


def is_bound(passage: Passage) -> bool:
    """Whether each block has to return what the engine made of what it was given: hooks must not change it.

    No property of Passage, since torch.compile of PyTorch 2.6 knows none of a NamedTuple.
    """
    return passage.tape is not None or passage.grid is not None


def run_plainly(block: Stepwise, passage: Passage, streams: Streams, context: Context) -> Streams:
    """The block's output under ordinary autograd."""
    inverse, log_det, grid, residuals = passage.inverse, passage.log_det, passage.grid, passage.residuals
    now = rotate([*streams], -block.rotation if inverse else 0)
    log_dets: list[Tensor] = []
    conditioners = block.conditioners(streams)
    for k, conditioner in reversed(conditioners) if inverse else conditioners:
        t = block.evaluate(conditioner, now[k], now[:k] + now[k + 1 :], context)
        x = now[k]
        now[k] = changed(block, inverse, grid, x, t)
        if grid is not None and residuals is not None and not block.translates:
            if inverse:
                if not residuals:
                    raise ValueError(_OTHER_RESIDUALS)
                now[k] = grid.restore(now[k], residuals.pop())
            else:
                with torch.no_grad():
                    residuals.append(grid.residual(x, changed(block, True, grid, now[k], t)))
        if passage.extent is not None:
            passage.extent.see(now[k])
        if log_det:
            log_dets.append(log_det_of(block, inverse, now[k] if inverse else x, t))
    now = rotate(now, 0 if inverse else block.rotation)
    return (*now, total(log_dets)) if log_det else tuple(now)


def changed(block: Stepwise, inverse: bool, grid: Grid | None, x: Tensor, t: Streams) -> Tensor:
    """The stream that a step makes of its target x."""
    if block.translates:
        if grid is not None:
            return (grid.take_back if inverse else grid.add)(x, *t)
        return (block.separate if inverse else block.combine)(x, *t)
    y = mapped(block, inverse, x, t)
    return y if grid is None else grid.round(y)


def mapped(block: Stepwise, inverse: bool, x: Tensor, t: Streams) -> Tensor:
    """`combine` or `separate`, checked to keep the stream's shape and dtype."""
    y: object = (block.separate if inverse else block.combine)(x, *t)
    if isinstance(y, Tensor) and y.shape == x.shape and y.dtype == x.dtype:
        return y
    found = f"a tensor of shape {tuple(y.shape)}, {y.dtype}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
    raise ValueError(
        f"{'separate' if inverse else 'combine'} has to return a tensor of the shape and dtype of the stream that it changes, "
        f"{tuple(x.shape)}, {x.dtype}; it returned {found}"
    )


def run_whole(block: nn.Module, passage: Passage, streams: Streams, context: Context) -> Streams:
    """As `run_plainly`, for a block known by `forward` and `inverse` alone."""
    outputs = _call_whole(block, passage.inverse, passage.log_det, streams, context)
    if passage.grid is None:
        return outputs
    count = len(outputs) - passage.log_det
    rounded = tuple([passage.grid.round(s) for s in outputs[:count]])
    if passage.extent is not None:
        for stream in rounded:
            passage.extent.see(stream)
    return rounded + outputs[count:]


def _call_whole(block: nn.Module, inverse: bool, log_det: bool, streams: Streams, context: Context) -> Streams:
    """Its streams, and its log-determinant if wanted."""
    call: Callable[..., object] = block.inverse if inverse else block  # type: ignore[assignment]
    outputs = as_streams(call(*streams, **context))
    if not log_det:
        return outputs
    of: Callable[..., Tensor] | None = getattr(block, "log_det", None)
    if of is None:
        raise NotImplementedError(f"a {type(block).__name__} has no log-determinant: write its method log_det")
    value = -of(*outputs, **context) if inverse else of(*streams, **context)
    if value.shape != streams[0].shape[:1]:
        raise ValueError(
            f"log_det has to return one value a sample; it returned a tensor of shape {tuple(value.shape)}"
        )
    return (*outputs, value)


def log_det_of(block: Stepwise, inverse: bool, x: Tensor, t: Streams) -> Tensor:
    """One value a sample; `x` is what `combine` is given, or what `separate` makes."""
    log_derivative: object = block.log_derivative(x, *t)
    if not (isinstance(log_derivative, Tensor) and log_derivative.shape == x.shape):
        raise ValueError(
            f"log_derivative has to return a tensor of the shape of the stream that combine changes, {tuple(x.shape)}; it "
            f"returned {described(log_derivative)}"
        )
    log_derivative = log_derivative.flatten(1).sum(1)
    return -log_derivative if inverse else log_derivative


def total(log_dets: list[Tensor]) -> Tensor:
    return log_dets[0] if len(log_dets) == 1 else torch.stack(log_dets).sum(0)


_OTHER_RESIDUALS = "there is no residual left for this block: they are of another sequence"
