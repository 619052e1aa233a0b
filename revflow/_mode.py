"""Whether the engine rebuilds activations, or ordinary autograd stores them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from revflow._replay import is_recomputing
from revflow._torch import is_exporting

_thread = threading.local()


@contextmanager
def ordinary_autograd() -> Iterator[None]:
    """Within this context sequences and recurrences, wherever they are in a network, run under ordinary autograd.

    They store every activation, and compute the same function: to compare with, in gradients, memory or time. It holds for
    the forward pass; the backward pass may come later. As `ReversibleSequence.plain`, for a whole network.
    """
    before = getattr(_thread, "is_off", False)
    _thread.is_off = True
    try:
        yield
    finally:
        _thread.is_off = before


def engine_applies() -> bool:
    """Whether to rebuild activations in the backward pass, or to run the blocks as ordinary modules: without gradients, as
    part of another chain's rerun, and under forward-mode differentiation and torch.func's transforms, which need graphs."""
    if torch.compiler.is_compiling():
        return torch.is_grad_enabled() and not is_exporting()
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    off = forward_mode or is_transformed() or is_recomputing() or getattr(_thread, "is_off", False)
    return torch.is_grad_enabled() and not off


def is_transformed() -> bool:
    """Whether one of torch.func's transforms is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None
