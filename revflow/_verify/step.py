"""The values of a training step that `verify` compares: its loss, and its gradients by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from revflow._base.torch_private import pytree
from revflow._replay.holders import copied
from revflow._verify.inspection import Worst

Gradients = dict[str, Tensor | None]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def worst_of(found: Gradients, expected: Gradients) -> Worst:
    """The largest relative error among the gradients that both have."""
    norms = {name: g.double().norm().item() for name, g in expected.items() if g is not None}
    floor = 1e-3 * max(norms.values(), default=0.0) or 1.0
    worst = Worst(0.0, "all equal")
    for name, e in expected.items():
        f = found[name]
        if f is not None and e is not None:
            difference = (f.double() - e.double()).norm().item()
            error = difference / max(norms[name], floor) if difference == difference else float("inf")
            worst = max(worst, Worst(error, name))
    return worst


def with_leaves(arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[Any, list[Tensor]]:
    """Copies of the arguments, and the new leaves among them: one for each floating-point tensor."""
    values, spec = pytree.tree_flatten(arguments)
    values = [
        v.detach().clone().requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else copied(v)
        for v in values  # Each run gets its own copy of an object, because the network may change it.
    ]
    leaves = [v for v in values if isinstance(v, Tensor) and v.requires_grad]
    return pytree.tree_unflatten(values, spec), leaves


def loss_of(output: object) -> Tensor:
    """The sum of all outputs, each value with a different weight."""
    total = torch.zeros(())
    for tensor in pytree.tree_leaves(output):
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            weights = torch.arange(tensor.numel(), device=tensor.device).add(1).double().cos().view(tensor.shape)
            total = total.to(tensor.device) + (tensor * weights.to(tensor.dtype)).sum()
    if not total.requires_grad:
        raise ValueError(
            "net returns no tensor that depends on a parameter or on a floating-point input, so that there is no gradient to "
            "compare: let it return one"
        )
    return total


def train(net: nn.Module, call: Callable[..., Any], arguments: Arguments) -> None:
    """Run a training step, without its result. `call` runs the network."""
    (inputs, context), leaves = with_leaves(arguments)
    parameters = [p for p in net.parameters() if p.requires_grad]
    torch.autograd.grad(loss_of(call(*inputs, **context)), [*leaves, *parameters], allow_unused=True)
