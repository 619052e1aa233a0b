"""Gradients that can be used but not differentiated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from revflow._base.streams import Gradients


def once(
    backward: Callable[[Any, Gradients], Gradients], ctx: Any, grads: Gradients, connected: Sequence[Tensor]
) -> Gradients:
    """The gradients that `backward` returns, if `create_graph` is on: they can be used but not differentiated.

    `backward` runs without a graph. The gradients are then connected to the graph through `connected`, tensors that lead to the
    output of the network. So a second derivative with respect to anything reaches the error of `_SecondDerivative`.
    """
    with torch.no_grad():
        found = backward(ctx, grads)
    return tuple(None if g is None else _SecondDerivative.apply(g, *connected) for g in found)  # type: ignore[no-untyped-call]


class _SecondDerivative(torch.autograd.Function):
    """The identity, which raises an error if it is differentiated."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *connected: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise RuntimeError(
            "a ReversibleSequence or ReversibleRecurrence cannot be differentiated twice: it stores no graph. Within "
            "`with revflow.ordinary_autograd():` the same network supports second derivatives"
        )
