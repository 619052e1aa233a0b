"""The kind of a call, by which its measured costs are found again: in this process, and in another one."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256

from torch import nn


def flags_of(modules: Iterable[nn.Module]) -> tuple[bool, ...]:
    """The modes of all modules inside of these, and which of their parameters require gradients.

    This runs in every call. `nn.Module.modules` and `parameters` would take three times as long.
    """
    found, flags = [*modules], []
    for module in found:  # grows during the loop
        own = module.__dict__
        flags.append(own["training"])
        flags += [p.requires_grad for p in own["_parameters"].values() if p is not None]
        found += [child for child in own["_modules"].values() if child is not None]
    return tuple(flags)


def fingerprint(kind: tuple[object, ...], modules: Iterable[nn.Module]) -> str:
    """A text that is the same in another process: of a kind without references, and of the structure of the call's modules."""
    structure = [
        (type(m).__qualname__, [tuple(p.shape) for p in m.parameters(recurse=False)])
        for module in modules
        for m in module.modules()
    ]
    return sha256(repr((kind, structure)).encode()).hexdigest()[:16]
