"""A text for a kind of call that is the same in another process."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256

from torch import nn


def fingerprint(options: object, given: object, switches: object, flags: object, modules: Iterable[nn.Module]) -> str:
    """Of the parts of a call's kind, and of its modules: their classes and the shapes of their parameters."""
    structure = [
        (type(m).__qualname__, [tuple(p.shape) for p in m.parameters(recurse=False)])
        for module in modules
        for m in module.modules()
    ]
    return sha256(repr((options, given, switches, flags, structure)).encode()).hexdigest()[:16]
