"""What existed before a step without data, and is the same after it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from revflow._base.torch_private import unchanged_versions

_OWNERS = (nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, torch.amp.GradScaler)


@contextmanager
def unchanged() -> Iterator[None]:
    """Restore the state of everything that a training step changes: of all networks, optimizers, schedulers and GradScalers.

    The values of tensors need not be restored, because no operator of a step without data changes them. This leaves gradients,
    attributes, random states, and the dictionaries and lists that refer to tensors.
    """
    objects = gc.get_objects()
    owners = [o for o in objects if issubclass(type(o), _OWNERS)]
    contents: dict[int, tuple[Any, Any]] = {}
    for owner in owners:
        _save(vars(owner), contents)
    leaves = [o for o in objects if issubclass(type(o), Tensor) and o.is_leaf]
    gradients = [(leaf, leaf.requires_grad, leaf.grad) for leaf in leaves]
    del objects
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices), unchanged_versions(leaves):
            yield
    finally:
        for container, content in contents.values():
            _restore(container, content)
        for leaf, requires_grad, gradient in gradients:
            if leaf.requires_grad != requires_grad:
                leaf.requires_grad_(requires_grad)
            if leaf.grad is not gradient:
                leaf.grad = gradient


def _save(container: Any, contents: dict[int, tuple[Any, Any]]) -> None:
    """Copy the contents of a dictionary, list or set, and of those in it, also of those in objects of revflow."""
    if str(type(container).__module__).startswith("revflow.") and hasattr(container, "__dict__"):
        container = vars(container)
    if not issubclass(type(container), (dict, list, set)) or id(container) in contents:
        return
    contents[id(container)] = container, container.copy()
    if not isinstance(container, set):
        for value in container.values() if isinstance(container, dict) else container:
            _save(value, contents)


def _restore(container: Any, content: Any) -> None:
    container.clear()
    if isinstance(container, list):
        container.extend(content)
    else:
        container.update(content)
