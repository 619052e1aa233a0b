"""Errors of a block or cell, raised again with its place in the network and the shapes of its streams."""

from __future__ import annotations

from torch import nn

from revflow._base.streams import Streams

BLOCK_ERRORS = (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError, AssertionError)
"""Types of errors that are raised again with the block's place. Their constructors take a message and nothing else."""


def with_place(error: Exception, place: str, module: nn.Module, streams: Streams) -> Exception:
    """An error of the same type, whose message begins with the place; subclasses (out of memory, for example) pass unchanged."""
    if type(error) not in BLOCK_ERRORS:
        return error
    shapes = ", ".join(str(tuple(s.shape)) for s in streams)
    remedy = next((hint for text, hint in _HINTS.items() if text in str(error)), "")
    return type(error)(f"{place} ({type(module).__name__}), given streams of shapes {shapes}: {error}{remedy}")


_NO_GRAPH = (
    ". The first of a conditioner's two evaluations runs without gradients. Compute gradients inside a conditioner within "
    "`with torch.enable_grad():`, of an input with requires_grad_(), and register hooks only if the tensor requires a gradient"
)
_HINTS = {
    "does not require grad": _NO_GRAPH,
    "doesn't require gradient": _NO_GRAPH,
    "can't retain_grad": _NO_GRAPH,
    "Expected gradient function to be set": _NO_GRAPH,
    "'NoneType' object has no attribute 'register_hook'": _NO_GRAPH,
    "unexpected keyword argument": ". The keyword arguments of a sequence's call reach every conditioner: let its forward take "
    "**context",
}
"""Remedies by a part of PyTorch's or Python's message."""
