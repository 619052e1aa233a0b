"""The state of tensors, modules and optimizers, restored after a step without data."""

from __future__ import annotations

import gc
from collections import OrderedDict, defaultdict
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

    No operator of a step without data changes values, so no values are copied. The step can replace the data and the gradients of
    tensors, change attributes and random states, and put tensors without data into dictionaries and lists.
    """
    types = set().union(*map(_subclasses, (Tensor, *_OWNERS)))
    objects = [o for o in gc.get_objects() if type(o) in types]  # isinstance would run properties of other objects
    contents: dict[int, tuple[Any, Any]] = {}
    for owner in objects:
        if not isinstance(owner, Tensor):
            _save(vars(owner), contents)
    leaves = [t for t in objects if type(t) in (Tensor, nn.Parameter) and t.is_leaf and not t.is_inference()]
    leaves = [*filter(_has_data, leaves)]
    states = [(leaf, leaf.data, leaf.requires_grad, leaf.grad) for leaf in leaves]
    del objects
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices), unchanged_versions(leaves):
            yield
    finally:
        for container, content in contents.values():
            _restore(container, content)
        for leaf, data, requires_grad, gradient in states:
            if leaf.layout is torch.strided and (leaf.dtype, leaf.data_ptr()) != (data.dtype, data.data_ptr()):
                leaf.data = data
            if leaf.requires_grad != requires_grad:
                leaf.requires_grad_(requires_grad)
            if leaf.grad is not gradient:
                leaf.grad = gradient


def _has_data(tensor: Tensor) -> bool:
    """False of tensors that transforms of torch.func wrap, and of those that torch.compile traces with symbolic sizes.

    Earlier compilations and transforms may hold such tensors. A step cannot replace their data.
    """
    try:
        return tensor.layout is not torch.strided or tensor.data_ptr() >= 0
    except RuntimeError:
        return False


def _subclasses(kind: type) -> set[type]:
    return {kind}.union(*map(_subclasses, type.__subclasses__(kind)))


def _save(container: Any, contents: dict[int, tuple[Any, Any]]) -> None:
    """Copy the contents of a dictionary, list or set, and of those in it, also of those in objects of revflow."""
    if str(type(container).__module__).startswith("revflow.") and hasattr(container, "__dict__"):
        container = vars(container)
    if type(container) not in (dict, OrderedDict, defaultdict, list, set) or id(container) in contents:
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
