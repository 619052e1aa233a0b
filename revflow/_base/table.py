"""A table of a sequence's blocks, for its repr."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from revflow._base.stepwise import Stepwise

Shapes = Mapping[str, Sequence[torch.Size]]
"""The shapes of a block's output streams, by the block's name."""


class _Cells(NamedTuple):
    block: str
    kind: str
    streams: str
    parameters: str


def table(blocks: Iterable[tuple[str, nn.Module]], shapes: Shapes, parameters: int) -> list[str]:
    """The table's lines: a heading, a row per run of equal blocks, and the sum, in which shared `parameters` count once."""
    rows, count = [_Cells("block", "", "streams" if shapes else "", "parameters")], 0
    looks = [(name, _look(name, block, shapes)) for name, block in blocks]
    for (_, kind, streams, its_parameters), run in groupby(looks, lambda pair: pair[1]):
        names = [name for name, _ in run]
        count += len(names)
        several = len(names) > 1
        times = f"{len(names)} x " if several and its_parameters else ""
        rows.append(
            _Cells(f"{names[0]}-{names[-1]}" if several else names[0], kind, streams, f"{times}{its_parameters:,}")
        )
    rows.append(_Cells("", f"{count} block{'s' * (count != 1)}", "", f"{parameters:,}"))
    a, b, c, d = (max(map(len, column)) for column in zip(*rows, strict=True))
    gap = "  " if c else ""
    return [f"{r.block:<{a}}  {r.kind:<{b}}  {r.streams:<{c}}{gap}{r.parameters:>{d}}" for r in rows]


def number_of_parameters(module: nn.Module) -> int:
    """Shared parameters count once. Those of lazy layers that have not run do not count, since their shapes are unknown."""
    return sum(p.numel() for p in module.parameters() if not is_lazy(p))


def _look(name: str, block: nn.Module, shapes: Shapes) -> tuple[str, str, str, int]:
    """The key by which blocks share a row: the whole repr, which is not shown, and the three cells that are."""
    inside = ", ".join(type(child).__name__ for child in block.children())
    kind = f"{type(block).__name__}({inside if isinstance(block, Stepwise) else block.extra_repr()})"
    return repr(block), kind, _streams(shapes.get(name, ())), number_of_parameters(block)


def _streams(shapes: Sequence[torch.Size]) -> str:
    """The shapes, in which neighbors that are equal are counted: 2 x (8, 16, 32, 32)."""
    runs = [(tuple(shape), len([*run])) for shape, run in groupby(shapes)]
    return ", ".join(f"{count} x {shape}" if count > 1 else f"{shape}" for shape, count in runs)
