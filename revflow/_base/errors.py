"""A block's error, with its place."""

from __future__ import annotations

from torch import nn

from revflow._base.streams import Streams

NAMED = (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError, AssertionError)
"""Errors of a block that are raised again with its place and what it was given."""


def named(error: Exception, place: str, module: nn.Module, streams: Streams) -> Exception:
    """The same error, with the place where it arose; one of another type (out of memory, say) as it is."""
    if type(error) not in NAMED:
        return error
    shapes = ", ".join(str(tuple(s.shape)) for s in streams)
    why = next((hint for text, hint in _HINTS.items() if text in str(error)), "")
    return type(error)(f"{place} ({type(module).__name__}), given streams of shapes {shapes}: {error}{why}")


_NO_GRAPH = (
    ". The first of a conditioner's two evaluations runs without gradients: compute what needs them within "
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
