"""The tensors that standard autograd would save for an evaluation, and its work.

The evaluation runs with a graph. Hooks count the tensors that the graph saves, and `drop` frees them, so that a measurement takes
little memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from revflow._base.streams import Tensors
from revflow._budget.work import Work
from revflow._replay.mode import ordinary_autograd


class Recording:
    """Records evaluations one after the other."""

    def __init__(self, known: Iterable[int]) -> None:
        """`known`: storages that do not count, by address."""
        self.saved: dict[int, int] = {}
        """Storages that the graph saves, with their sizes in bytes."""
        self.work = Work()
        self._known = frozenset(known)
        self._held: list[list[Tensor]] = []
        """The tensors that the graph holds, each in a list that can be emptied."""
        self._counted: list[StorageWeakRef] = []
        """References that keep a new storage from getting the address of a freed one: both would count as one."""

    @contextmanager
    def running(self) -> Iterator[None]:
        """A context in which an evaluation is recorded."""
        # In the second evaluation of a conditioner, a sequence inside it stores everything. So it must here.
        hooks = saved_tensors_hooks(self._pack, lambda held: held[0])
        with ordinary_autograd(), torch.enable_grad(), hooks, self.work:
            yield

    def drop(self) -> None:
        """Free the saved tensors: no backward pass follows. Those of many evaluations would pile up."""
        for held in self._held:
            held.clear()
        self._held.clear()

    def _pack(self, tensor: Tensor) -> list[Tensor]:
        self.saved |= {key: size for key, size in storages([tensor]).items() if key not in self._known}
        if tensor.layout == torch.strided:
            self._counted.append(StorageWeakRef(tensor.untyped_storage()))
        self._held.append([tensor.detach()])  # An alias, because the tensor itself may refer to the graph.
        return self._held[-1]


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """The size in bytes of each storage, by its address."""
    found = [t.untyped_storage() for t in tensors if t.layout == torch.strided]
    return {s._cdata: s.nbytes() for s in found}


def without_graph(tensors: Tensors, given: Tensors) -> Tensors:
    """The tensors, detached; those among the given ones as they are."""
    return tuple([t if any([t is g for g in given]) else t.detach() for t in tensors])
