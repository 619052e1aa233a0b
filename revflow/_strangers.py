"""Tensors that an evaluation depends on, and that the engine does not know of: they would get no gradient."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from revflow._holders import place_of
from revflow._passage import Arguments, Streams

_REGISTER = "Register it, or pass it by itself as a keyword argument of the call"


def refuse_strangers(
    user: str,
    outputs: Streams,
    inputs: Sequence[Tensor],
    module: nn.Module | None,
    arguments: Arguments | None,
    remedy: str = "",
) -> None:
    """Refuse a graph from `inputs` to `outputs` that uses another leaf, or that cannot be differentiated here."""
    stranger = stranger_among(outputs, inputs)
    if stranger is None:
        return
    if not isinstance(stranger, Tensor):
        raise RuntimeError(
            f"{user} uses torch.utils.checkpoint with use_reentrant=True, which gives parameters their gradients behind the "
            f"engine's back: pass use_reentrant=False"
        )
    in_context = None if arguments is None else place_of(stranger, arguments.others)
    place = in_context or (None if module is None else place_of(stranger, {type(module).__name__: module}))
    if in_context is not None:
        remedy = (
            "The engine sees tensors only in lists, tuples and dictionaries: pass it as a keyword argument by itself"
        )
    found = "" if place is None else f" ({place})"
    raise RuntimeError(
        f"{user} uses a tensor of shape {tuple(stranger.shape)}{found} that needs a gradient and is neither its parameter nor an "
        f"argument: it would get none. {remedy or _REGISTER}"
    )


def _holders_of(leaf: Tensor) -> int:
    return sys.getrefcount(leaf)


def _holders_of_a_local_leaf() -> int:
    """What `_holders_of` finds for a leaf that a function has made and that only its graph holds: another in each release."""
    node = (lambda: torch.ones(1, requires_grad=True) * 1)().grad_fn
    leaf: Tensor = node.next_functions[0][0].variable  # type: ignore[union-attr]
    return _holders_of(leaf)


_ALONE = _holders_of_a_local_leaf()
_REENTRANT = CheckpointFunction._backward_cls


def stranger_among(outputs: Streams, inputs: Sequence[Tensor]) -> Tensor | Any | None:
    """A leaf in the graph of `outputs` that is none of `inputs`; or the node of a reentrant checkpoint.

    A leaf that the evaluation has made itself does not count: nobody holds it, and nobody waits for its gradient.
    """
    known = {id(i) for i in inputs}
    nodes = [o.grad_fn for o in outputs if o.grad_fn is not None]
    seen = set(nodes)
    for node in nodes:  # which grows on the way
        following = node.next_functions
        if not following:
            leaf = getattr(node, "variable", None)
            if leaf is not None and id(leaf) not in known and _holders_of(leaf) > _ALONE:
                return leaf
        elif type(node) is _REENTRANT:
            return node
        for child, _ in following:
            if child is not None and child not in seen:
                seen.add(child)
                nodes.append(child)
    return None
