"""Tensors that an evaluation depends on without being registered, and reentrant checkpoints: they would get no gradient."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from revflow._base.streams import Streams
from revflow._replay.arguments import Arguments
from revflow._replay.holders import place_of

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


def _holders_of_leaf(node: Any) -> int:
    """The references to the leaf of an AccumulateGrad node. No variable of a Python function holds it meanwhile: how many
    references that takes changes as soon as torch.compile has replaced the interpreter's evaluation of frames."""
    return sys.getrefcount(node.variable)


def _node_of_a_leaf() -> Any:
    return (torch.ones(1, requires_grad=True) * 1).grad_fn.next_functions[0][0]  # type: ignore[union-attr]


_ALONE = _holders_of_leaf(_node_of_a_leaf())
"""What `_holders_of_leaf` finds if only its graph holds the leaf: another number in each release."""
_LEAF = type(_node_of_a_leaf())
_REENTRANT = CheckpointFunction._backward_cls


def stranger_among(outputs: Streams, inputs: Sequence[Tensor]) -> Tensor | Any | None:
    """A leaf in the graph of `outputs` that is none of `inputs`; or the node of a reentrant checkpoint.

    A leaf that the evaluation has made itself does not count: nobody holds it, and nobody waits for its gradient.
    """
    known = {id(i) for i in inputs}
    nodes: list[Any] = [o.grad_fn for o in outputs if o.grad_fn is not None]
    seen = set(nodes)
    for node in nodes:  # which grows on the way
        following = node.next_functions
        if not following:
            if type(node) is _LEAF and id(node.variable) not in known and _holders_of_leaf(node) > _ALONE:
                return node.variable
        elif type(node) is _REENTRANT:
            return node
        for child, _ in following:
            if child is not None and child not in seen:
                seen.add(child)
                nodes.append(child)
    return None
