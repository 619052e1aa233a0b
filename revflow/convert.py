"""Conversion of residual networks: from x + F(x) on one stream to additive couplings on two.

A residual network computes x <- x + F(x) for one residual branch F after the other. From y = x + F(x), x cannot be recomputed.
From two streams, each changed by branches that read the other, both can (RevNet, Gomez et al. 2017; Reformer, Kitaev et al.
2020, eq. 9; Rev-ViT, Mangalam et al. 2022). The branches stay the same, but the network computes a different function.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from revflow._base.memory_size import MemoryBudget
from revflow._guard.policy import Mode
from revflow.budget import Plan
from revflow.coupling import AdditiveCoupling
from revflow.exact import Grid
from revflow.sequence import ReversibleSequence


class TwoStreams(nn.Module):
    """A module that maps one tensor to one tensor and has two internal streams.

    Both streams start as the input x, and the output is their mean, with the shape and dtype of x. (In Rev-ViT, the streams are
    concatenated instead, so the head is twice as wide.) The `sequence` attribute is the `ReversibleSequence`, which takes and
    returns both streams. The input cannot be recovered from the mean, but `net.sequence.inverse((y1, y2))` recovers it from the
    two output streams y1 and y2.

    The input to each branch is the stream that the previous branch changed. This stream is x plus the outputs of the previous
    branch and every second branch before that one, not of all earlier branches. The mean of both streams is x plus half the sum
    of all branch outputs, whereas a residual network computes x plus the full sum.

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
            raise TypeError(
                f"TwoStreams takes one tensor, with which both streams start; got a {type(x).__name__}. net.sequence takes two"
            )
        y1, y2 = self.sequence((x, x), **context)
        mean: Tensor = (y1 + y2) / 2
        return mean

    @property
    def memory_budget(self) -> MemoryBudget:
        """The memory budget of `sequence`."""
        return self.sequence.memory_budget

    @memory_budget.setter
    def memory_budget(self, budget: MemoryBudget) -> None:
        self.sequence.memory_budget = budget

    def plan(self, x: Tensor, **context: Any) -> Plan:
        """Run `ReversibleSequence.plan` for a training step with an input like `x`."""
        return self.sequence.plan((x, x), **context)


def reversible(
    functions: Iterable[nn.Module | tuple[nn.Module, nn.Module]],
    *,
    guard: Mode = "warn",
    exact: bool | Grid = False,
    memory_budget: MemoryBudget = "min",
    chunks: int = 1,
) -> TwoStreams:
    """Convert the residual branches of a network into a network that trains without storing activations.

    If the network contains `for F in functions: x = x + F(x)`, replace this loop with `net = reversible(functions)` and
    `x = net(x)`. A pair (F, G), such as a transformer's attention and MLP, each with its normalization, becomes one block. If the
    same functions are passed individually, the result is the same, but there are twice as many blocks.

        F         (x1, x2) -> (x2, x1 + F(x2))
        (F, G)    y1 = x1 + F(x2),  y2 = x2 + G(y1)

    **The parameters are the same, but the function is different, so pretrained weights do not transfer.** Train from scratch, or
    fine-tune. For the formula, see `TwoStreams`. The width, the number of parameters and the number of operations remain the
    same.

    Args:
        functions: Residual branches F(x, **context) that return tensors of the shape of x. Pass F, not x + F(x). The branches are
            not copied; they are registered as `sequence.<block>.F` and `sequence.<block>.G`.
        guard: Reaction to incorrect recomputed values. For this option and the following ones, see `ReversibleSequence`.
        exact: Whether to make gradients bit-identical to those computed with stored activations.
        memory_budget: Memory available for activations.
        chunks: Number of micro-batches in which a recomputed branch is evaluated.

    Raises:
        TypeError: If `functions` is a single module, or if an entry is neither a module nor a pair of modules.
        ValueError: If a branch returns a tensor of a different shape in the first call. The message names the block.

    Examples:
        >>> pair = lambda: (torch.nn.Linear(8, 8), torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 8)))
        >>> revflow.reversible([pair() for _ in range(6)])(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """
    blocks = [AdditiveCoupling(*pair) for pair in _pairs(functions)]
    return TwoStreams(ReversibleSequence(blocks, guard=guard, exact=exact, memory_budget=memory_budget, chunks=chunks))


def _pairs(functions: Iterable[nn.Module | tuple[nn.Module, ...]]) -> Iterator[tuple[nn.Module, ...]]:
    """The functions, each as a tuple of one or two modules; TypeError for anything else."""
    if isinstance(functions, nn.Module) and not isinstance(functions, nn.ModuleList):
        kind = type(functions).__name__
        raise TypeError(
            f"reversible takes a list of residual branches; got a single {kind}: write reversible([function])"
        )
    for k, entry in enumerate(functions):
        pair = entry if isinstance(entry, tuple) else (entry,)
        if not (1 <= len(pair) <= 2 and all(isinstance(f, nn.Module) for f in pair)):
            kinds = ", ".join(type(f).__name__ for f in pair)
            raise TypeError(
                f"block {k} must be a residual branch F, or a pair (F, G) of them, as torch.nn.Modules; got ({kinds})"
            )
        yield pair
