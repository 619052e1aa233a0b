"""The keyword arguments of a call, split into tensors and the rest."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from revflow._base.streams import Context, Streams
from revflow._base.torch_private import pytree
from revflow._replay.reachable import Reachable, has_holders


class Arguments:
    """The keyword arguments of a call. Their tensors may be in any nesting of lists, tuples and dictionaries."""

    def __init__(self, context: Context) -> None:
        self.tensors: Streams = ()
        self._spec: pytree.TreeSpec | None = None
        self._has_holders = bool(context) and has_holders(context)
        if context:
            self._leaves, self._spec = pytree.tree_flatten(context)
            self._positions = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
            self.tensors = tuple(self._leaves[i] for i in self._positions)
            for i in self._positions:
                self._leaves[i] = None

    @property
    def switches(self) -> tuple[bool | str, ...]:
        """Booleans and strings: they may choose between ways of computing. Numbers may differ in each call, and do not count."""
        return () if self._spec is None else tuple([leaf for leaf in self._leaves if isinstance(leaf, (bool, str))])

    @property
    def others(self) -> Context:
        """The keyword arguments, with None in the place of each tensor."""
        return self.filled(self.tensors and (None,) * len(self.tensors))  # type: ignore[arg-type]

    def watch(self, context: Context) -> Reachable | None:
        """The tensors in `context` before an evaluation; None if no argument can store a tensor."""
        return Reachable(context) if self._has_holders else None

    def filled(self, tensors: Sequence[Tensor]) -> Context:
        """The keyword arguments, with `tensors` in the place of their own."""
        if self._spec is None:
            return {}
        leaves = list(self._leaves)
        for i, tensor in zip(self._positions, tensors, strict=True):
            leaves[i] = tensor
        context: Context = pytree.tree_unflatten(leaves, self._spec)
        return context
