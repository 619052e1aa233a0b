"""Gradients that can be used, but not differentiated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from revflow._base.streams import Gradients


def once(
    backward: Callable[[Any, Gradients], Gradients], ctx: Any, grads: Gradients, connected: Sequence[Tensor]
) -> Gradients:
    """Call `backward`, where a graph is asked for, without one: its gradients can be used, but not differentiated.

    `connected` leads to the chain's output, and so to all that a second derivative could be asked for.
    """
    with torch.no_grad():
        found = backward(ctx, grads)
    return tuple(None if g is None else _SecondDerivative.apply(g, *connected) for g in found)  # type: ignore[no-untyped-call]


class _SecondDerivative(torch.autograd.Function):
    """The identity, which refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *connected: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise RuntimeError(
            "a ReversibleSequence or ReversibleRecurrence cannot be differentiated twice: it keeps no graph. Within "
            "`with revflow.ordinary_autograd():` the same network can"
        )
