"""The tensors that standard autograd would save for evaluations, and their work.

An evaluation runs with a graph. Hooks count the tensors that the graph saves, and `section` drops them, so that the measurement
itself takes little memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from revflow._base.streams import Tensors
from revflow._budget.work import OPERATIONS_PER_BYTE, Work
from revflow._replay.mode import ordinary_autograd


class Recording:
    """Records evaluations that run one after the other."""

    def __init__(self, known: Iterable[int], is_compiled: bool = False) -> None:
        """`known`: storages that existed before, by address; they do not count."""
        self.known_saved: set[int] = set()
        """The known storages that the graph saves."""
        self.at_last_save = 0
        """The work done when the graph saved its last tensor."""
        self.is_read = False
        """Whether an evaluation differentiates something itself, and so reads saved tensors."""
        self._known, self._is_compiled, self._counter = frozenset(known), is_compiled, Work()
        self._saved: dict[int, int] = {}
        self._bytes = 0
        """Of all storages that the graph has saved."""
        self._held: list[list[Tensor]] = []
        """The tensors that the graph holds, each in a list that can be emptied."""
        self._counted: list[StorageWeakRef] = []
        """References that keep a new storage from getting the address of a freed one: both would count as one."""

    @property
    def work(self) -> int:
        """The work so far; for compiled code, whose operations are not counted, an estimate from the bytes that it saves."""
        return OPERATIONS_PER_BYTE * self._bytes if self._is_compiled else self._counter.total

    @contextmanager
    def running(self) -> Iterator[None]:
        """A context in which evaluations are recorded."""
        # In the second evaluation of a conditioner, a sequence inside it stores everything. So it must here.
        # The mode that counts would make dynamo compile a module once more, or never compile it.
        counter = nullcontext() if self._is_compiled else self._counter
        with ordinary_autograd(), torch.enable_grad(), saved_tensors_hooks(self._pack, self._unpack), counter:
            yield

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """A context whose work does not count."""
        before = self._counter.total
        yield
        self._counter.total = before

    def section(self) -> dict[int, int]:
        """The sizes in bytes of the storages that the graph has saved since the last call, by address.

        No backward pass follows, so the graph need not hold them. Those of many micro-batches would pile up.
        """
        for held in self._held:
            held.clear()
        self._held.clear()
        saved, self._saved = self._saved, {}
        return saved

    def _pack(self, tensor: Tensor) -> list[Tensor]:
        for key, size in storages([tensor]).items():
            if key in self._known:
                self.known_saved.add(key)
            else:
                self._bytes += 0 if key in self._saved else size
                self._saved[key] = size
            self._counted.append(StorageWeakRef(tensor.untyped_storage()))
        self.at_last_save = self.work
        self._held.append([tensor.detach()])  # An alias, because the tensor itself may refer to the graph.
        return self._held[-1]

    def _unpack(self, held: list[Tensor]) -> Tensor:
        self.is_read = True
        return held[0]


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """The size in bytes of each storage, by its address."""
    found = [t.untyped_storage() for t in tensors if t.layout == torch.strided]
    return {s._cdata: s.nbytes() for s in found}


def without_graph(tensors: Tensors, given: Tensors) -> Tensors:
    """The tensors, detached; those among the given ones as they are."""
    return tuple([t if any([t is g for g in given]) else t.detach() for t in tensors])
