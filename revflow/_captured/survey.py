"""A check, while PyTorch traces a call of a sequence, of whether the call can be captured.

The two evaluations of a conditioner in a graph agree only if it draws no random numbers and changes no state. So the conditioners
are evaluated once on fake tensors, which have no data. Every operation is seen then, also those that no module reveals, such as
`torch.nn.functional.dropout`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

from revflow._base.stepwise import Stepwise
from revflow._base.streams import Context, Streams, rotate
from revflow._base.torch_capture import hint_of
from revflow._base.torch_private import fake_tensor
from revflow._base.user_warnings import warn
from revflow._captured.call import Call, Path, located, register
from revflow._captured.watch import ObjectionError, refuse_hooks, restored, watched
from revflow._replay.autocast import autocast, autocast_state
from revflow._replay.mode import is_evaluating, this_thread
from revflow._rewind.block_list import BlockList, flattened
from revflow._rewind.direction import FORWARD, INVERSE
from revflow._rewind.laws import Law
from revflow._rewind.passage import Passage
from revflow._rewind.plain import call_whole

OUTSIDE = "a ReversibleSequence runs outside of this compiled graph: {}"


class Given(NamedTuple):
    """A tensor argument of the call, without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Survey(NamedTuple):
    """The result of the check."""

    objection: str = ""
    """The reason why the call cannot be captured; empty if it can."""
    number: int = -1
    """Of the call, for `call.registered`."""
    paths: tuple[Path, ...] = ()
    """The tensors of all blocks, each once."""
    moving: tuple[tuple[str, ...], ...] = ()
    """By block, in the order in which they run: the names of the buffers that an evaluation changes."""
    moved: tuple[int, ...] = ()
    """The places of these buffers among the tensors."""


def survey(sequence: BlockList, passage: Passage, join: int | None, streams: Streams, context: Context) -> Survey:
    """Find out whether a call of the sequence can be captured."""
    tensors = tuple([(name, *_kind_of(value)) for name, value in context.items() if isinstance(value, Tensor)])
    others = tuple([(name, value) for name, value in context.items() if not isinstance(value, Tensor)])
    if not all([value is None or isinstance(value, (bool, int, float, str)) for _, value in others]):
        return Survey("a keyword argument is neither a tensor nor a number, a string or None")
    given = [*streams, *[value for value in context.values() if isinstance(value, Tensor)]]
    if any([a is b for k, a in enumerate(given) for b in given[:k]]):
        return Survey("the same tensor is passed twice")
    kinds = tuple([_kind_of(s) for s in streams])
    return Survey(*_surveyed(sequence, (passage.direction.name, passage.log_det, join), kinds, tensors, others))


def _kind_of(tensor: Tensor) -> tuple[Any, ...]:
    return tuple([hint_of(n) for n in tensor.shape]), tensor.dtype, tensor.device


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _surveyed(
    sequence: BlockList,
    options: tuple[str, bool, int | None],
    streams: tuple[tuple[Any, ...], ...],
    tensors: tuple[tuple[Any, ...], ...],
    others: tuple[tuple[str, Any], ...],
) -> tuple[Any, ...]:
    """The fields of a `Survey`.

    PyTorch calls this function while it traces the call, and takes the result as a constant. So the arguments are constants too.
    `options` are the name of the direction, whether the log-determinant is computed, and the dimension along which streams are
    joined. `streams` has the fields of a `Given` for each stream. `tensors` has the same, after the name, for each tensor among
    the keyword arguments. `others` has the other keyword arguments.
    """
    direction, log_det, join = options
    passage = Passage(FORWARD if direction == FORWARD.name else INVERSE, log_det=log_det)
    moving: list[tuple[str, ...]] = []
    objection = _objection_to_options(sequence)
    if not objection and not all([given[1].is_floating_point for given in streams]):
        objection = "a stream does not consist of floating-point numbers"
    if not objection:
        context = {name: Given(*given) for name, *given in tensors} | dict(others)
        objection, moving = _survey_of_blocks(sequence, passage, [Given(*s) for s in streams], context)
    if objection:
        warn(OUTSIDE.format(objection), UserWarning)
        return (objection,)
    state = tuple(autocast_state(streams[0][2]))
    names = tuple([name for name, *_ in tensors])
    call, paths = located(Call(ref(sequence), passage, join, len(streams), names, dict(others), state), moving)
    return "", register(call), tuple(paths), tuple(moving), call.moved


def _objection_to_options(sequence: Any) -> str:
    if sequence.exact:
        return "in exact arithmetic, both evaluations must agree in every bit, but a compiler may fuse them differently"
    if sequence.chunks > 1:
        return "only the engine evaluates conditioners in chunks"
    if sequence.memory_budget != "min":
        return f"only the engine plans a memory budget ({sequence.memory_budget!r})"
    return ""


def _survey_of_blocks(
    sequence: BlockList, passage: Passage, streams: Sequence[Given], context: dict[str, Any]
) -> tuple[str, list[tuple[str, ...]]]:
    blocks = [*flattened(sequence)][:: passage.direction.sign]
    moving: list[tuple[str, ...]] = []
    name, block = "", nn.Module()
    outer = is_evaluating()
    fake_mode = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
    device = streams[0].device
    uncached = autocast(autocast_state(device), device)
    with restored(sequence, device), fake_mode, uncached, torch.enable_grad():
        this_thread.evaluating = True
        try:
            now: Streams = tuple(map(_made, streams))
            filled = {key: _made(value) if isinstance(value, Given) else value for key, value in context.items()}
            for name, block in blocks:  # noqa: B007
                refuse_hooks(block)
                outputs, its = _through(passage, block, now, filled)
                now = tuple([s.detach().requires_grad_() for s in outputs[: len(now)]])
                moving.append(its)
            statistics = [block.get_buffer(n) for (_, block), names in zip(blocks, moving, strict=True) for n in names]
            if len({*map(id, statistics)}) < len(statistics):
                return "two conditioners share a BatchNorm, whose statistics they both move", []
        except ObjectionError as objection:
            return f"block {name} ({type(block).__name__}): {objection}", []
        except Exception as error:
            return f"block {name} ({type(block).__name__}) cannot be traced: {type(error).__name__}: {error}", []
        finally:
            this_thread.evaluating = outer
    return "", moving


def _through(passage: Passage, block: nn.Module, streams: Streams, context: Context) -> tuple[Streams, tuple[str, ...]]:
    """The block's output, and the names of statistics that move. ObjectionError if the code does more than that."""
    arguments = [value for value in context.values() if isinstance(value, Tensor)]
    if not isinstance(block, Stepwise):
        evaluate = partial(call_whole, block, passage.direction, passage.log_det, streams, context)
        moving, outputs = watched(block, block, evaluate, (*streams, *arguments))
        return outputs, moving
    law, moving = Law(block, passage), ()
    now = rotate([*streams], law.rotations[0])
    for k, conditioner in block.conditioners(streams)[:: passage.direction.sign]:
        x, others = now[k], now[:k] + now[k + 1 :]
        evaluate = partial(block.evaluate, conditioner, x, others, context)
        its, t = watched(block, conditioner, evaluate, (*others, *arguments))
        moving += its
        now[k] = law.apply(x, *t).detach()
    return tuple(rotate(now, law.rotations[1])), moving


def _made(given: Given) -> Tensor:
    return torch.empty(given.shape, dtype=given.dtype, device=given.device, requires_grad=given.dtype.is_floating_point)
