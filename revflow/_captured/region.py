"""Functions that a compiled graph contains once, and may call several times.

Equal groups of blocks are one function with different operands. So the time to compile a sequence does not grow with its depth.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from revflow._base.torch_capture import compilation, invoke, traced
from revflow._replay.mode import is_evaluating, this_thread

Results = Sequence[Tensor | None]
Function = Callable[..., Results]

_known: WeakKeyDictionary[Any, dict[Hashable, Region]] = WeakKeyDictionary()
"""By compilation, and by key and layout of the operands."""


def call(key: Hashable, function: Function, operands: Sequence[Tensor]) -> Results:
    """The function's results. A compilation traces and compiles only one of the functions with the same key.

    The operands must be different tensors. Their layouts are part of the key.
    """
    now = compilation(operands)
    if now is None:
        with evaluating():
            return function(*operands)
    regions = _known.setdefault(now, {})
    key = key, tuple(map(_layout, operands))
    if key not in regions:
        regions[key] = Region(f"revflow_{len(regions)}", function, operands)
    return regions[key](operands)


class Region:
    """A function in a compiled graph."""

    def __init__(self, name: str, function: Function, operands: Sequence[Tensor]) -> None:
        def unshared(*tensors: Tensor) -> Results:
            with evaluating():
                return _unshared(function(*tensors), tensors)

        self._name, self._graph = name, traced(unshared, operands)
        inputs = [*self._graph.graph.find_nodes(op="placeholder")]
        (end,) = self._graph.graph.find_nodes(op="output")
        outputs = [*end.args[0]]
        computed = [*dict.fromkeys([o for o in outputs if o is not None and o not in inputs])]
        nodes = [*inputs, *computed]
        self._places = [None if o is None else nodes.index(o) for o in outputs]
        """By result: its place among the operands and the graph's outputs."""
        end.args = (tuple(computed),)
        self._graph.recompile()

    def __call__(self, operands: Sequence[Tensor]) -> Results:
        tensors = [*operands, *invoke(self._graph, self._name, operands)]
        return [None if k is None else tensors[k] for k in self._places]


@contextmanager
def evaluating() -> Iterator[None]:
    """A context in which sequences inside of conditioners run under standard autograd."""
    outer = is_evaluating()
    this_thread.evaluating = True
    try:
        yield
    finally:
        this_thread.evaluating = outer


def _unshared(results: Results, operands: Sequence[Tensor]) -> Results:
    """The results, of which each one is an operand itself, or has memory of its own."""
    known = {StorageWeakRef(t.untyped_storage()) for t in operands}
    own = []
    for result in results:
        if result is not None and not any([result is t for t in operands]):
            storage = StorageWeakRef(result.untyped_storage())
            result = result.clone() if storage in known else result
            known.add(storage)
        own.append(result)
    return own


def _layout(tensor: Tensor) -> Hashable:
    # A dynamic size cannot be hashed, and must not be compared: that would make it static.
    return tensor.dtype, tensor.device, str(tuple(tensor.shape)), str(tensor.stride())
