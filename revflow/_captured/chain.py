"""The call of a sequence, as torch.compile traces it: from its bytecode, it sees each block once, and the blocks' tensors."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from revflow._base.stepwise import Stepwise
from revflow._base.streams import Context, Streams, rotate
from revflow._base.torch_capture import (
    CAN_BE_CAPTURED,
    break_graph,
    erase_unused_nodes,
    last_node,
    reparametrized,
    warn_of_old_release,
)
from revflow._captured.call import tensor_at
from revflow._captured.function import run
from revflow._captured.survey import OUTSIDE, Survey, survey
from revflow._rewind.block_list import BlockList, flattened
from revflow._rewind.chain import streams_of
from revflow._rewind.direction import Direction
from revflow._rewind.laws import Law
from revflow._rewind.passage import Passage
from revflow._rewind.plain import call_whole, run_plainly, total


def captured(
    sequence: BlockList, x: Tensor | Streams, split_dim: int, direction: Direction, log_det: bool, context: Context
) -> tuple[Any, Tensor | None] | None:
    """The output of a sequence, as a part of the graph that PyTorch traces, and the log-determinant if that is computed.

    None if that is not possible. The graph then ends before this call, which is an error with `fullgraph=True`.
    """
    if not CAN_BE_CAPTURED:
        warn_of_old_release()
        return None
    passage = Passage(direction, log_det=log_det)
    streams, join = streams_of(x, split_dim), split_dim if isinstance(x, Tensor) else None
    found = survey(sequence, passage, join, streams, context)
    if found.objection:
        break_graph(OUTSIDE.format(found.objection))
        return None
    log_dets: list[Tensor] = []
    blocks = [block for _, block in flattened(sequence)][:: passage.direction.sign]
    if found.recomputed:
        streams, log_dets = _recomputed(sequence, passage, streams, context, found)
    for block in blocks[found.recomputed :]:
        streams, log_dets = _stored(passage, block, streams, context, log_dets)
    if join is not None and len(streams) > 1:  # if not, the recomputed blocks have joined them
        streams = (torch.cat(streams, join),)
    return (streams if join is None else streams[0]), total(log_dets, streams[0]) if log_det else None


def _recomputed(
    sequence: BlockList, passage: Passage, streams: Streams, context: Context, found: Survey
) -> tuple[Streams, list[Tensor]]:
    """The output and the log-determinant of the blocks whose activations are recomputed."""
    before = last_node()
    _observe(sequence, passage, streams, context, found)
    observed = last_node()
    own = [tensor_at(sequence, path) for path in found.paths]
    leaves = [value for value in context.values() if isinstance(value, Tensor)]
    returned = run(found.number, *streams, *leaves, *own)
    erase_unused_nodes(before, observed)
    results = (returned,) if isinstance(returned, Tensor) else returned
    count = len(results) - len(found.moved)
    for place, value in zip(found.moved, results[count:], strict=True):
        own[place].copy_(value)
    if passage.log_det:
        return tuple(results[: count - 1]), [results[count - 1]]
    return tuple(results[:count]), []


def _stored(
    passage: Passage, block: nn.Module, streams: Streams, context: Context, log_dets: list[Tensor]
) -> tuple[Streams, list[Tensor]]:
    """The output of a block under standard autograd, and the log-determinants so far."""
    if isinstance(block, Stepwise):
        outputs = run_plainly(Law(block, passage), streams, context)
    else:
        outputs = call_whole(block, passage.direction, passage.log_det, streams, context)
    if not passage.log_det or (isinstance(block, Stepwise) and len(outputs) == len(streams)):
        return outputs, log_dets
    return outputs[:-1], [*log_dets, outputs[-1]]


def _observe(sequence: BlockList, passage: Passage, streams: Streams, context: Context, found: Survey) -> None:
    """Let PyTorch see the bytecode of every conditioner, to compile the graph again if an attribute changes that it reads."""
    now = [*streams]
    with torch.no_grad():
        for k, (_, block) in enumerate([*flattened(sequence)][:: passage.direction.sign][: found.recomputed]):
            with reparametrized(block, dict.fromkeys(found.moving[k])) if found.moving[k] else nullcontext():
                now = _observed(passage, block, now, context)


def _observed(passage: Passage, block: nn.Module, now: list[Tensor], context: Context) -> list[Tensor]:
    """Streams of the layout of the block's output."""
    if not isinstance(block, Stepwise):
        return [*call_whole(block, passage.direction, False, tuple(now), context)]
    law = Law(block, passage)
    now = rotate(now, law.rotations[0])
    for k, conditioner in block.conditioners(tuple(now))[:: passage.direction.sign]:
        block.evaluate(conditioner, now[k], now[:k] + now[k + 1 :], context)
    return rotate(now, law.rotations[1])
