"""Whether the engine rebuilds activations, or ordinary autograd stores them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple
from weakref import WeakSet

import torch
from torch import nn

from revflow._base.torch_private import (
    backward_pass,
    checkpointed_call,
    is_exporting,
    is_forward_ad,
    is_traced,
    is_transformed,
)
from revflow._replay.replay import is_evaluating, is_recomputing

_thread = threading.local()


@contextmanager
def ordinary_autograd() -> Iterator[None]:
    """Within this context sequences and recurrences, wherever they are in a network, run under ordinary autograd.

    They store every activation, and compute the same function: to compare with, in gradients, memory or time. It holds for
    the forward pass; the backward pass may come later. As `ReversibleSequence.plain`, for a whole network.

    Examples:
        >>> net = revflow.ReversibleSequence([revflow.AdditiveCoupling(torch.nn.Linear(4, 4)) for _ in range(8)])
        >>> with revflow.ordinary_autograd():
        ...     y = net(torch.randn(2, 8))  # stores all activations
    """
    before = getattr(_thread, "is_off", None)
    _thread.is_off = before or _Off(checkpointed_call())
    try:
        yield
    finally:
        _thread.is_off = before


class _Off(NamedTuple):
    """The state of a thread within `ordinary_autograd()`."""

    call: object
    """The call of `torch.utils.checkpoint` that the context is within; None if it is within none."""


_off_when_recomputed: WeakSet[object] = WeakSet()
"""Calls of `torch.utils.checkpoint` within an `ordinary_autograd()`, which may have ended when they are recomputed."""


def engine_applies() -> bool:
    """Whether to rebuild activations in the backward pass, or to run the blocks as ordinary modules: without gradients, as
    part of another chain's rerun, and under forward-mode differentiation and torch.func's transforms, which need graphs."""
    if torch.compiler.is_compiling():
        return torch.is_grad_enabled() and not is_exporting()
    if is_forward_ad() or is_transformed() or is_recomputing() or is_evaluating() or is_traced():
        return False
    return torch.is_grad_enabled() and not _is_off()


def _is_off() -> bool:
    """Whether this is within `ordinary_autograd()`, or recomputes what was."""
    off: _Off | None = getattr(_thread, "is_off", None)
    if off is None:
        is_in_backward = backward_pass() != -1
        return is_in_backward and checkpointed_call() in _off_when_recomputed
    call = checkpointed_call()
    if call is not None and call is not off.call:
        _off_when_recomputed.add(call)
    return True


def refuse_compiled_autograd() -> None:
    """At the beginning of a backward pass."""
    if torch.compiler.is_compiling():
        _refuse_compiled_autograd()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _refuse_compiled_autograd() -> None:
    raise RuntimeError(
        "compiled autograd runs a backward pass outside of the autograd engine, which a sequence or recurrence depends on: "
        "leave it off (torch._dynamo.config.compiled_autograd = False), or run the network within "
        "`with revflow.ordinary_autograd():`"
    )


def refuse_replica(module: nn.Module) -> None:
    if "_is_replica" in module.__dict__:
        raise RuntimeError(
            f"this {type(module).__name__} is a replica of torch.nn.DataParallel, whose parameters are hidden from the engine "
            f"and would get no gradient: use DistributedDataParallel, which also is faster"
        )
