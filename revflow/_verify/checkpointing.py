"""PyTorch's activation checkpointing of each block of a network, for comparison with the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from revflow._base.stepwise import Stepwise
from revflow._base.streams import Streams
from revflow._base.torch_private import checkpointed_call
from revflow._replay.mode import ordinary_autograd
from revflow._rewind.block_list import flattened
from revflow._rewind.chain import streams_of
from revflow._rewind.direction import FORWARD, Direction
from revflow._rewind.plain import total
from revflow.recurrence import ReversibleRecurrence
from revflow.sequence import ReversibleSequence


class Checkpointing:
    """Runs networks of one architecture under standard autograd, with each block and each time step checkpointed.

    A checkpoint contains a coupling and the bijections before it, or one time step of a recurrence. The last checkpoint of a
    forward pass is left out, because its backward pass comes first. The first forward pass counts them.
    """

    def __init__(self) -> None:
        self.count = 0
        """Number of checkpoints of the first forward pass."""
        self._is_known = False
        self._index = 0

    @contextmanager
    def of(self, net: nn.Module) -> Iterator[None]:
        """Checkpoint the blocks of `net` within this context, which must enclose the forward and the backward pass."""
        self._index = 0
        with ordinary_autograd(), ExitStack() as stack:
            for module in dict.fromkeys(outermost(net)):
                if isinstance(module, ReversibleSequence):
                    name, function = "_run", self._in_parts(module)
                else:
                    name, function = "plain_step", partial(self._run, module.plain_step)
                setattr(module, name, function)
                stack.callback(delattr, module, name)
            yield
        if not self._is_known:
            self.count, self._is_known = self._index, True

    def _in_parts(self, sequence: ReversibleSequence) -> Callable[..., tuple[Any, Any]]:
        """The sequence's `_run`, with a checkpoint for each part."""
        parts = [
            ReversibleSequence(blocks, sequence.split_dim, guard="off", exact=sequence.exact)
            for blocks in _groups(sequence)
        ]

        def run(
            x: Tensor | Streams, context: dict[str, Any], direction: Direction = FORWARD, log_det: bool = False
        ) -> tuple[Any, Any]:
            streams, log_dets = streams_of(x, sequence.split_dim), []
            for part in parts[:: direction.sign]:
                streams, its_log_det = self._run(part._run, streams, context, direction, log_det)
                log_dets.append(its_log_det)
            y = torch.cat(streams, sequence.split_dim) if isinstance(x, Tensor) else streams
            return y, total(log_dets, streams[0]) if log_det else None

        return run

    def _run(self, function: Callable[..., Any], *arguments: Any, **context: Any) -> Any:
        """Call the function within a checkpoint, unless the network checkpoints this call itself."""
        if not torch.is_grad_enabled() or checkpointed_call() is not None:
            return function(*arguments, **context)
        self._index += 1
        if self._is_known and self._index == self.count:
            return function(*arguments, **context)
        return checkpoint(function, *arguments, use_reentrant=False, **context)


def outermost(module: nn.Module) -> Iterator[ReversibleSequence | ReversibleRecurrence]:
    """The sequences and recurrences that are not inside of another one."""
    if isinstance(module, (ReversibleSequence, ReversibleRecurrence)):
        yield module
        return
    for child in module.children():
        yield from outermost(child)


def _groups(sequence: ReversibleSequence) -> list[list[nn.Module]]:
    """The blocks of a sequence, each together with the blocks before it that have no parameters."""
    groups: list[list[nn.Module]] = [[]]
    before: list[nn.Module] = []
    for _, block in flattened(sequence):
        before.append(block)
        if isinstance(block, Stepwise) or any(True for _ in block.parameters()):
            groups.append(before)
            before = []
    groups[-1] += before
    return groups[1:] or groups
