"""Residual networks made reversible: from x + F(x) on one stream to additive couplings on two.

A residual network computes x <- x + F(x) for one function F after the other. Of y = x + F(x) alone x cannot be rebuilt; of
two streams, each changed by functions of the other, both can (RevNet, Gomez et al. 2017; Reformer, Kitaev et al. 2020,
eq. 9; Rev-ViT, Mangalam et al. 2022). The functions stay what they are; what is computed with them does not.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from revflow._base.memory_size import MemoryBudget
from revflow._guard.policy import Mode
from revflow.budget import Plan
from revflow.coupling import AdditiveCoupling
from revflow.exact import Grid
from revflow.sequence import ReversibleSequence


class TwoStreams(nn.Module):
    """A module of one tensor on a sequence of two streams: both begin as x, and their mean is the output.

    The output has x's shape and dtype. (Rev-ViT joins the streams instead, for a head of twice the width.) What else a
    `ReversibleSequence` offers, `sequence` has, for streams. The mean of two streams cannot be undone; the streams themselves
    can, by `net.sequence.inverse((y1, y2))`.

    Examples:
        >>> net = revflow.reversible([torch.nn.Linear(8, 8) for _ in range(6)])
        >>> type(net).__name__, len(net.sequence)
        ('TwoStreams', 6)
    """

    def __init__(self, sequence: ReversibleSequence) -> None:
        super().__init__()
        self.sequence = sequence

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"TwoStreams takes one tensor, which both streams begin as; got a {type(x).__name__}")
        y1, y2 = self.sequence((x, x), **context)
        mean: Tensor = (y1 + y2) / 2
        return mean

    @property
    def memory_budget(self) -> MemoryBudget:
        """What activations may take: that of the sequence."""
        return self.sequence.memory_budget

    @memory_budget.setter
    def memory_budget(self, budget: MemoryBudget) -> None:
        self.sequence.memory_budget = budget

    def plan(self, x: Tensor, **context: Any) -> Plan:
        """What the memory budget keeps in a training step with `x`, as `ReversibleSequence.plan` tells it."""
        return self.sequence.plan((x, x), **context)


def reversible(
    functions: Iterable[nn.Module | tuple[nn.Module, nn.Module]],
    *,
    guard: Mode = "warn",
    exact: bool | Grid = False,
    memory_budget: MemoryBudget = "none",
    chunks: int = 1,
) -> TwoStreams:
    """Turn the residual functions of a network into one that trains without storing activations.

    Where the network has `for F in functions: x = x + F(x)`, write `x = net(x)` with `net = reversible(functions)`. A pair
    (F, G), such as a transformer's attention and MLP, each with its normalisation in front, becomes one block; the same
    functions without pairs compute the same in twice as many blocks.

        one function     (x1, x2) -> (x2, x1 + F(x2))
        a pair           y1 = x1 + F(x2),  y2 = x2 + G(y1)

    **It is another function of the same parameters.** Each F sees the stream that the function before it has changed: x and
    the sum of every other function before, not of all; and the mean of both streams is x plus half the sum of all functions'
    values, where the residual network has the whole sum. So weights that were trained without it do not fit: train anew, or
    fine-tune. Width, parameters and operations are the same.

    Args:
        functions: modules F(x, **context), from a tensor to one of the same shape; the sum is not among what F does. The
            modules are taken, not copied: parameters shared with the rest of a network stay shared.
        guard: what to do where streams are rebuilt wrongly; all options are those of `ReversibleSequence`.
        exact: whether gradients are those of stored activations to the last bit.
        memory_budget: what activations may take.
        chunks: in how many slices of the batch to run the functions.

    Returns a module of one tensor of any shape that the functions take. Parameters are named `sequence.<block>.F.<name>`, of
    a pair's second function `sequence.<block>.G.<name>`.

    Raises TypeError for one function that is in no list, and for what is neither a module nor a pair of them. A function that
    returns another shape, or no tensor, is a ValueError of the first call. Both name the block.

    Examples:
        >>> def branch():
        ...     return torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 8))
        >>> net = revflow.reversible([(branch(), branch()) for _ in range(6)])
        >>> net(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """
    if isinstance(functions, nn.Module) and not isinstance(functions, nn.ModuleList):
        kind = type(functions).__name__
        raise TypeError(f"reversible takes a list of residual functions; got one {kind}: write reversible([function])")
    blocks = [AdditiveCoupling(*_checked(k, entry)) for k, entry in enumerate(functions)]
    return TwoStreams(ReversibleSequence(blocks, guard=guard, exact=exact, memory_budget=memory_budget, chunks=chunks))


def _checked(k: int, entry: nn.Module | tuple[nn.Module, ...]) -> tuple[nn.Module, ...]:
    """The function, or the pair."""
    functions = entry if isinstance(entry, tuple) else (entry,)
    if 1 <= len(functions) <= 2 and all(isinstance(f, nn.Module) for f in functions):
        return functions
    kinds = ", ".join(type(f).__name__ for f in functions)
    raise TypeError(
        f"block {k} has to be a residual function F, or a pair (F, G) of them, as torch.nn.Modules; got ({kinds})"
    )
