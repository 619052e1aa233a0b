"""A search through autograd graphs for leaves that are not among the known inputs, and for reentrant checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from revflow._base.streams import Streams
from revflow._base.torch_private import ReentrantCheckpoint


class ReentrantNode:
    """A reentrant checkpoint, as a result of the search."""


def untracked(outputs: Streams, inputs: Sequence[Tensor]) -> Tensor | ReentrantNode | None:
    """A leaf in the graph of `outputs` that is not one of `inputs`, or a reentrant checkpoint; None if there is neither.

    A leaf that the evaluation itself created does not count. Only the graph refers to it, so that nothing can use its gradient.
    """
    known = {id(i) for i in inputs}
    nodes: list[Any] = [o.grad_fn for o in outputs if o.grad_fn is not None]
    seen = set(nodes)
    for node in nodes:  # grows during the loop
        following = node.next_functions
        if not following:
            if type(node) is _LEAF and id(node.variable) not in known and _references_to_leaf(node) > _ONLY_GRAPH:
                leaf: Tensor = node.variable
                return leaf
        elif type(node) is ReentrantCheckpoint:
            return ReentrantNode()
        for child, _ in following:
            if child is not None and child not in seen:
                seen.add(child)
                nodes.append(child)
    return None


def _references_to_leaf(node: Any) -> int:
    """The number of references to the leaf of an AccumulateGrad node.

    `node.variable` must not be assigned to a variable here. The references that a variable adds depend on whether torch.compile
    has replaced the interpreter's evaluation of frames.
    """
    return sys.getrefcount(node.variable)


def _node_of_a_leaf() -> Any:
    return (torch.ones(1, requires_grad=True) * 1).grad_fn.next_functions[0][0]  # type: ignore[union-attr]


_ONLY_GRAPH = _references_to_leaf(_node_of_a_leaf())
"""The number of references to a leaf to which only a graph refers. It differs between releases of PyTorch and Python."""
_LEAF = type(_node_of_a_leaf())
