"""The blocks of a sequence: which modules it accepts, and the order in which they run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Self

from torch import nn

from revflow._base.stepwise import Stepwise
from revflow._base.torch_private import has_own_hook


class BlockList(nn.Sequential):
    """An `nn.Sequential` that accepts only invertible blocks."""

    def __init__(self, blocks: Iterable[nn.Module] | Mapping[str, nn.Module]) -> None:
        super().__init__()
        if isinstance(blocks, nn.Module) and not isinstance(blocks, Iterable):
            kind = type(blocks).__name__
            raise TypeError(
                f"ReversibleSequence takes a list of blocks; got a single {kind}: write ReversibleSequence([block])"
            )
        for name, block in blocks.items() if isinstance(blocks, Mapping) else enumerate(blocks):
            self.add_module(str(name), block)

    # nn.Sequential's append, extend, += and *= call add_module.
    def add_module(self, name: str, module: nn.Module | None) -> None:
        super().add_module(name, _checked(name, module))

    def insert(self, index: int, module: nn.Module) -> Self:
        super().insert(index, _checked(index, module))
        return self

    def __setitem__(self, index: int, module: nn.Module) -> None:
        super().__setitem__(index, _checked(index, module))


def flattened(blocks: BlockList) -> Iterator[tuple[str, nn.Module]]:
    """(name, block), with the blocks of nested lists in their place."""
    for name, block in blocks._modules.items():
        if isinstance(block, BlockList):
            yield from ((f"{name}.{inner}", b) for inner, b in flattened(block))
        elif block is not None:
            yield name, block


def conditioners_in(blocks: BlockList) -> set[nn.Module]:
    """The conditioners of all couplings. One that contains a list of blocks is left out: the conditioners of that list count."""
    return {
        conditioner
        for block in blocks.modules()
        if isinstance(block, Stepwise)
        for conditioner in block.children()
        if not any(isinstance(m, BlockList) for m in conditioner.modules())
    }


def refuse_ignored(blocks: BlockList, forward: Callable[..., Any]) -> None:
    """Refuse a nested sequence whose hooks, options, or `forward` other than the given one, would have no effect."""
    for name, block in blocks._modules.items():
        if isinstance(block, BlockList):
            if type(block).forward is not forward or has_own_hook(block):
                raise RuntimeError(
                    f"block {name} is a ReversibleSequence with hooks or its own forward. Inside another sequence only its "
                    f"blocks run, and the rest would be skipped: move the hooks or the code to its blocks"
                )
            # A nested sequence may leave options unset. For exact no value counts as unset: False would contradict an outer grid.
            for option, unset in (("exact", None), ("memory_budget", "min"), ("chunks", 1)):
                inner, outer = getattr(block, option), getattr(blocks, option)
                if inner not in (outer, unset):
                    raise RuntimeError(
                        f"block {name} is a ReversibleSequence with {option}={inner!r} inside one with {option}={outer!r}. Only "
                        f"the outer value has an effect: set both to the same value"
                    )
            refuse_ignored(block, forward)


def _checked(name: str | int, block: object) -> nn.Module:
    """The block; TypeError if it is not invertible, or is a coupling with its own parameters."""
    if isinstance(block, Stepwise) and isinstance(block, nn.Module):
        own = [p for p, _ in block.named_parameters() if p.split(".")[0] not in ("F", "G")]
        if own:
            raise TypeError(
                f"block {name} ({type(block).__name__}) has its own parameter {own[0]}. combine and separate would use it "
                f"without giving it a gradient: let the conditioner return it as a coefficient"
            )
    if isinstance(block, nn.Module) and callable(getattr(block, "inverse", None)):
        return block
    raise TypeError(
        f"block {name} must be a module with forward and inverse; got a {type(block).__name__}. To use a residual branch F as a "
        f"block, pass revflow.AdditiveCoupling(F)"
    )
