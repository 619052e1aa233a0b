"""The structure of a block: two blocks of the same structure differ only in the values of their tensors.

PyTorch traces and compiles the code of one of them, and uses it for the others.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, type
_INTERNALS = frozenset(vars(nn.Module())) - {"training", "_parameters", "_buffers"}
"""The attributes of every module that no evaluation reads, such as its hooks, or that `structure_of` reads by itself."""


def structure_of(block: nn.Module) -> Hashable:
    """Equal for two blocks that compute the same function of their tensors, and of their arguments."""
    numbers: dict[int, int] = {}
    return tuple(
        [
            (path, type(module), numbers.setdefault(id(module), len(numbers)), _comparable(_attributes(module)))
            for path, module in block.named_modules(remove_duplicate=False)
        ]
    )


def length_of_groups(kinds: Sequence[Hashable]) -> int:
    """The length of the groups, from 3 to 6 blocks, into which the blocks of these kinds are divided.

    Each kind of group is compiled once. So the length is the one with which the fewest blocks are compiled. Of two, it is the
    longer one, since each group is a function call in the compiled code.
    """

    def compiled(length: int) -> int:
        return sum(map(len, {tuple(kinds[k : k + length]) for k in range(0, len(kinds), length)}))

    return min((6, 5, 4, 3), key=compiled)


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _INTERNALS}


def _comparable(value: Any) -> Hashable:
    """Equal for two values that code cannot distinguish. The values of tensors do not count."""
    if isinstance(value, Tensor):
        return Tensor
    if isinstance(value, _PLAIN):
        return type(value), value
    if type(value) in (tuple, list, torch.Size):
        return type(value), tuple(map(_comparable, value))
    if type(value) is dict:
        return dict, tuple([(key, _comparable(its)) for key, its in value.items()])
    return "identity", id(value)
