"""A check, while PyTorch traces a call of a sequence, of whether the call can be captured.

The two evaluations of a conditioner in a graph agree only if it draws no random numbers and changes no state. So the conditioners
are evaluated once on fake tensors, which have no data. Every operation is seen then, also those that no module reveals, such as
`torch.nn.functional.dropout`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from revflow._base.stepwise import Stepwise
from revflow._base.streams import Context, Streams, rotate
from revflow._base.torch_capture import hint_of
from revflow._base.torch_private import (
    fake_tensor,
)
from revflow._base.user_warnings import warn
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


Moving = tuple[nn.Module, tuple[str, ...]]
"""A conditioner, and the names of its buffers that an evaluation changes."""


class Survey(NamedTuple):
    """The result of the check."""

    objection: str
    """The reason why the call cannot be captured; empty if it can."""
    moving: tuple[tuple[str, ...], ...]
    """By conditioner, in the order in which they run: the names of the buffers that an evaluation changes."""
    places: tuple[tuple[int, ...], ...]
    """By conditioner: the places of its parameters among those of the call. Each is there once."""


def survey(sequence: BlockList, passage: Passage, streams: Streams, context: Context) -> Survey:
    """Find out whether a call of the sequence can be captured."""
    tensors = tuple([(name, *_kind_of(value)) for name, value in context.items() if isinstance(value, Tensor)])
    others = tuple([(name, value) for name, value in context.items() if not isinstance(value, Tensor)])
    if not all([value is None or isinstance(value, (bool, int, float, str)) for _, value in others]):
        return Survey("a keyword argument is neither a tensor nor a number, a string or None", (), ())
    given = [*streams, *[value for value in context.values() if isinstance(value, Tensor)]]
    if any([a is b for k, a in enumerate(given) for b in given[:k]]):
        return Survey("the same tensor is passed twice", (), ())
    found = _surveyed(
        sequence, passage.direction.name, passage.log_det, tuple([_kind_of(s) for s in streams]), tensors, others
    )
    return Survey(*found)


def _kind_of(tensor: Tensor) -> tuple[Any, ...]:
    return tuple([hint_of(n) for n in tensor.shape]), tensor.dtype, tensor.device


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _surveyed(
    sequence: BlockList,
    direction: str,
    log_det: bool,
    streams: tuple[tuple[Any, ...], ...],
    tensors: tuple[tuple[Any, ...], ...],
    others: tuple[tuple[str, Any], ...],
) -> tuple[Any, ...]:
    """The fields of a `Survey`.

    PyTorch calls this function while it traces the call, and takes the result as a constant. So the arguments are constants too.
    `streams` has the fields of a `Given` for each stream. `tensors` has the same, after the name, for each tensor among the
    keyword arguments. `others` has the other keyword arguments.
    """
    passage = Passage(FORWARD if direction == FORWARD.name else INVERSE, log_det=log_det)
    objection, found = _objection_to_options(sequence), [(), ()]
    if not objection and not all([given[1].is_floating_point for given in streams]):
        objection = "a stream does not consist of floating-point numbers"
    if not objection:
        context = {name: Given(*given) for name, *given in tensors} | dict(others)
        objection, *found = _survey_of_blocks(sequence, passage, [Given(*s) for s in streams], context)
    if objection:
        warn(OUTSIDE.format(objection), UserWarning)
    return objection, *found


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
) -> tuple[Any, ...]:
    blocks = [*flattened(sequence)][:: passage.direction.sign]
    moving: list[Moving] = []
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
                outputs = _through(passage, block, now, filled, moving)[: len(now)]
                now = tuple([s.detach().requires_grad_() for s in outputs])
            statistics = [module.get_buffer(name) for module, names in moving for name in names]
            if len({*map(id, statistics)}) < len(statistics):
                return "two conditioners share a BatchNorm, whose statistics they both move", (), ()
        except ObjectionError as objection:
            return f"block {name} ({type(block).__name__}): {objection}", (), ()
        except Exception as error:
            return f"block {name} ({type(block).__name__}) cannot be traced: {type(error).__name__}: {error}", (), ()
        finally:
            this_thread.evaluating = outer
    return "", tuple([names for _, names in moving]), _places(blocks, passage, len(now))


def _places(blocks: Sequence[tuple[str, nn.Module]], passage: Passage, width: int) -> tuple[tuple[int, ...], ...]:
    """`Survey.places`."""
    streams, places = (torch.empty(0),) * width, dict[int, int]()
    found = []
    for _, block in blocks:
        modules = [block]
        if isinstance(block, Stepwise):
            modules = [m for _, m in block.conditioners(streams)[:: passage.direction.sign]]
        found += [tuple([places.setdefault(id(p), len(places)) for p in m.parameters()]) for m in modules]
    return tuple(found)


def _through(passage: Passage, block: nn.Module, streams: Streams, context: Context, moving: list[Moving]) -> Streams:
    """The block's output. `moving` gets the names of statistics that move. ObjectionError if the code does more than that."""
    tensors = [value for value in context.values() if isinstance(value, Tensor)]
    if not isinstance(block, Stepwise):
        evaluate = partial(call_whole, block, passage.direction, passage.log_det, streams, context)
        its, outputs = watched(block, evaluate, (*streams, *tensors))
        moving.append((block, its))
        return outputs
    law = Law(block, passage)
    now = rotate([*streams], law.rotations[0])
    for k, conditioner in block.conditioners(streams)[:: passage.direction.sign]:
        x, others = now[k], now[:k] + now[k + 1 :]
        evaluate = partial(block.evaluate, conditioner, x, others, context)
        its, t = watched(conditioner, evaluate, (*others, *tensors))
        moving.append((conditioner, its))
        now[k] = law.apply(x, *t).detach()
    return tuple(rotate(now, law.rotations[1]))


def _made(given: Given) -> Tensor:
    return torch.empty(given.shape, dtype=given.dtype, device=given.device, requires_grad=given.dtype.is_floating_point)
