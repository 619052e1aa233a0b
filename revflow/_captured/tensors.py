"""The tensors of a block, and a context in which the block has others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn


class Holder(NamedTuple):
    """A place in a block that holds a tensor."""

    path: str
    """The module's name in the block."""
    module: nn.Module
    table: str
    """The module's dictionary that contains the tensor: its parameters, its buffers, or its attributes."""
    name: str

    @property
    def tensor(self) -> Tensor:
        return getattr(self.module, self.table)[self.name]  # type: ignore[no-any-return]


def holders_of(block: nn.Module) -> list[Holder]:
    """The places of all parameters and buffers, and of attributes that are tensors."""
    return [
        Holder(path, module, table, name)
        for path, module in block.named_modules()
        for table in ("_parameters", "_buffers", "__dict__")
        for name, value in getattr(module, table).items()
        if isinstance(value, Tensor)
    ]


@contextmanager
def holding(block: nn.Module, holders: Sequence[Holder], tensors: Sequence[Tensor | None]) -> Iterator[None]:
    """A context in which the block holds these tensors. At its end, all attributes of all modules are restored.

    `torch.func.functional_call` does the same only for parameters and buffers.
    """
    before = {module: dict(vars(module)) for module in block.modules()}
    for module, attributes in before.items():
        vars(module).update({table: dict(attributes[table]) for table in ("_parameters", "_buffers")})
    for holder, tensor in zip(holders, tensors, strict=True):
        getattr(holder.module, holder.table)[holder.name] = tensor
    try:
        yield
    finally:
        for module, attributes in before.items():
            vars(module).clear()
            vars(module).update(attributes)
