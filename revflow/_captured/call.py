"""One call of a sequence in a compiled graph: what is known of it while PyTorch traces bytecode."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from revflow._base.streams import Context
from revflow._captured.tensors import holders_of
from revflow._rewind.block_list import BlockList, flattened
from revflow._rewind.passage import Passage

Path = tuple[tuple[str, ...], str]
"""The names of nested modules, and of a tensor in the last of them."""


class Call(NamedTuple):
    """One call of a sequence. It has no reference to a module: compiled code may outlive the sequence."""

    sequence: weakref.ref[BlockList]
    passage: Passage
    join: int | None
    """The dimension along which the output's streams are joined; None if they are not."""
    names: tuple[str, ...]
    """Of the tensors among the keyword arguments."""
    others: Context
    """The keyword arguments that are not tensors."""
    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    """Its state, for `_replay.autocast.autocast`."""
    recomputed: int
    """The number of blocks that it runs: the first ones. Standard autograd runs the others, and stores their activations."""
    widths: tuple[int, ...] = ()
    """The numbers of streams before each block, in the order in which they run, and after the last one."""
    places: tuple[tuple[int, ...], ...] = ()
    """By block, in the order in which they run: the places of its tensors among those of the call. Each is there once."""
    moving: tuple[tuple[int, ...], ...] = ()
    """By block: the places of the buffers that it changes."""

    @property
    def blocks(self) -> list[tuple[str, nn.Module]]:
        """Names and blocks, in the order in which they run."""
        sequence = self.sequence()
        assert sequence is not None, "compiled code runs only as long as its modules exist"
        return [*flattened(sequence)][:: self.passage.direction.sign][: self.recomputed]

    @property
    def moved(self) -> tuple[int, ...]:
        return tuple([place for places in self.moving for place in places])

    def split(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
        """The streams, the tensors among the keyword arguments, and those of the blocks."""
        a = self.widths[0]
        b = a + len(self.names)
        return tensors[:a], tensors[a:b], tensors[b:]

    @property
    def kind(self) -> tuple[object, ...]:
        """All that the functions of its groups depend on, apart from their blocks."""
        return (
            self.passage.direction.name,
            self.passage.log_det,
            self.names,
            tuple(self.others.items()),
            self.autocast,
        )

    def context(self, leaves: Sequence[Tensor]) -> Context:
        """The keyword arguments, with these tensors."""
        return self.others | dict(zip(self.names, leaves, strict=True))


def located(modules: Sequence[tuple[str, nn.Module]]) -> tuple[list[Path], dict[int, int], tuple[tuple[int, ...], ...]]:
    """The tensors of named modules: the paths to them, each once, their places by identity, and their places by module."""
    paths: list[Path] = []
    numbers: dict[int, int] = {}
    places = []
    for name, module in modules:
        holders = holders_of(module)
        for holder in holders:
            if id(holder.tensor) not in numbers:
                numbers[id(holder.tensor)] = len(paths)
                paths.append((tuple(filter(None, f"{name}.{holder.path}".split("."))), holder.name))
        places.append(tuple([numbers[id(h.tensor)] for h in holders]))
    return paths, numbers, tuple(places)


def tensor_at(module: nn.Module, path: Path) -> Tensor:
    """The tensor with this path."""
    inner: Any = module
    for name in path[0]:
        inner = getattr(inner, name)
    return getattr(inner, path[1])  # type: ignore[no-any-return]


_calls: dict[int, Any] = {}
_numbers = count()


def register(call: Any, module: nn.Module) -> int:
    """A number for the call of a module, which a graph can contain."""
    number = next(_numbers)
    _calls[number] = call
    weakref.finalize(module, _calls.pop, number)
    return number


def registered(number: int) -> Any:
    return _calls[number]
