"""The mode in which a thread runs blocks: by the engine, under standard autograd, or inside of another block's evaluation."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple
from weakref import WeakSet

import torch

from revflow._base.torch_capture import is_transformed_in_a_graph
from revflow._base.torch_private import (
    backward_pass,
    checkpointed_call,
    is_exporting,
    is_forward_ad,
    is_traced,
    is_transformed,
)

this_thread = threading.local()
"""`evaluating` and `recomputing` are true during a first and a second evaluation, `standard` within `ordinary_autograd()`."""


def is_recomputing() -> bool:
    """Return whether a backward pass is currently evaluating a conditioner for the second time.

    Forward hooks, and modules that count or log their inputs, run in both evaluations of a conditioner. Call this function to
    distinguish between the two evaluations.

    Examples:
        >>> class Counting(torch.nn.Linear):
        ...     calls = 0
        ...
        ...     def forward(self, x):
        ...         if not revflow.is_recomputing():
        ...             type(self).calls += 1
        ...         return super().forward(x)
        >>> net = revflow.ReversibleSequence([revflow.AdditiveCoupling(Counting(4, 4))])
        >>> net(torch.randn(2, 8)).sum().backward()
        >>> Counting.calls
        1
    """
    return getattr(this_thread, "recomputing", False)


def is_evaluating() -> bool:
    """Whether a conditioner is currently evaluated for the first time."""
    return getattr(this_thread, "evaluating", False)


@contextmanager
def ordinary_autograd() -> Iterator[None]:
    """A context manager that makes all sequences and recurrences run under standard autograd.

    Sequences and recurrences then compute the same function, but every activation is stored. Use this context to compare
    gradients, memory or time. The context must enclose the forward pass; the backward pass may run outside the context. For a
    single sequence, use `ReversibleSequence.plain`.

    Examples:
        >>> net = revflow.ReversibleSequence([revflow.AdditiveCoupling(torch.nn.Linear(4, 4)) for _ in range(8)])
        >>> with revflow.ordinary_autograd():
        ...     y = net(torch.randn(2, 8))  # stores all activations
    """
    before = getattr(this_thread, "standard", None)
    this_thread.standard = before or _Standard(checkpointed_call())
    try:
        yield
    finally:
        this_thread.standard = before


class _Standard(NamedTuple):
    """The state of a thread within `ordinary_autograd()`."""

    call: object
    """The call of `torch.utils.checkpoint` around the context; None if there is none."""


_standard_when_recomputed: WeakSet[object] = WeakSet()
"""Calls of `torch.utils.checkpoint` that ran within `ordinary_autograd()`.

PyTorch recomputes them in the backward pass, when the context may have ended. They must then run under standard autograd again.
"""


def engine_applies() -> bool:
    """Whether the engine runs blocks here, and recomputes their activations in the backward pass.

    If not, blocks run as standard modules do. That is so without gradients, within `ordinary_autograd()` and inside of another
    block's evaluation. It is also so under forward-mode differentiation, torch.func's transforms, tracing and export, which
    need graphs.
    """
    if torch.compiler.is_compiling():
        is_standard = getattr(this_thread, "standard", None) is not None or is_exporting()
        return torch.is_grad_enabled() and not (is_standard or is_evaluating() or is_transformed_in_a_graph())
    if is_forward_ad() or is_transformed() or is_recomputing() or is_evaluating() or is_traced():
        return False
    return torch.is_grad_enabled() and not _is_standard()


def _is_standard() -> bool:
    """Whether the current code runs within `ordinary_autograd()`, or recomputes a checkpoint that did."""
    standard: _Standard | None = getattr(this_thread, "standard", None)
    if standard is None:
        return backward_pass() != -1 and checkpointed_call() in _standard_when_recomputed
    call = checkpointed_call()
    if call is not None and call is not standard.call:
        _standard_when_recomputed.add(call)
    return True
