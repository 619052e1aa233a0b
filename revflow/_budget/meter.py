"""What ordinary autograd would keep of each block: counted in a forward pass with a graph, dropped step by step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from revflow._base.streams import Streams
from revflow._replay.mode import ordinary_autograd
from revflow.budget import Cost


class Block(Protocol):
    """A block's pass, as far as the meter knows it."""

    position: str
    block_type: str
    parameters: list[Tensor]
    passage: Any

    @property
    def replays(self) -> Sequence[object]: ...

    def first(self, streams: Streams, leaves: Sequence[Tensor]) -> tuple[Streams, Streams]: ...


class Meter:
    """Measures one pass through a chain."""

    def __init__(self, given: Iterable[Tensor]) -> None:
        """`given`: what is there before the pass: parameters, buffers, context."""
        self.costs: list[Cost] = []
        """By block, in the order in which they ran."""
        self._given = _storages(given)
        self._saved: dict[int, int] = {}
        self._of_step: dict[int, int] = {}
        self._transients: list[int] = []
        self._gradients: list[int] = []
        self._held: list[list[Tensor]] = []
        """What the graph of this step has saved."""
        self._counted: list[StorageWeakRef] = []
        """As long as these are there no other storage gets the address of one that is gone."""

    def first(self, call: Block, streams: Streams, leaves: Sequence[Tensor]) -> tuple[Streams, Streams]:
        """As `call.first`."""
        known = self._given.keys() | _storages([*streams, *leaves, *call.parameters]).keys()
        self._saved, self._of_step, self._transients, self._gradients = {}, {}, [], []
        self._counted.clear()

        def pack(tensor: Tensor) -> list[Tensor]:
            self._of_step.update({key: size for key, size in _storages([tensor]).items() if key not in known})
            if tensor.layout == torch.strided:
                self._counted.append(StorageWeakRef(tensor.untyped_storage()))
            self._held.append([tensor.detach()])  # an alias: the tensor itself may refer to the graph
            return self._held[-1]

        # A sequence within a conditioner keeps everything when that is run again, and is to do so here.
        with ordinary_autograd(), torch.enable_grad(), saved_tensors_hooks(pack, lambda held: held[0]):
            outputs, kept = call.first(streams, leaves)
        results = outputs[: len(outputs) - call.passage.log_det]
        made = {key: size for key, size in _storages(results).items() if key not in _storages(streams)}
        if not self._transients:
            # A block that takes no steps: beside its second result there is what its inverse has made.
            self.step(results, _bytes(streams))
        slices = len(self._transients) // len(call.replays)  # a conditioner's
        self.costs.append(
            Cost(
                call.position,
                call.block_type,
                graph=sum(self._saved.values()),
                made=sum(size for key, size in made.items() if key not in self._saved),
                inputs=_bytes(streams),
                outputs=_bytes(results),
                anchors=_bytes(kept),
                transient=max(self._transients) + (slices > 1) * sum(made.values()),  # gradients that are put together
                gradient=max(self._gradients) * slices,
            )
        )
        return _without_graph(outputs, streams), _without_graph(kept, streams)

    def step(self, t: Streams, temporary: int) -> None:
        """One conditioner has run: with the values t, and `temporary` bytes needed to use and to undo them."""
        saved, self._of_step = self._of_step, {}
        self._saved |= saved
        for held in self._held:  # nobody is going to differentiate it; slices would pile up
            held.clear()
        self._held.clear()
        values = sum(size for key, size in _storages(t).items() if key not in saved)
        gradient = max(saved.values(), default=0)
        self._gradients.append(gradient)
        self._transients.append(sum(saved.values()) + max(gradient, values + temporary))


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Their storages' sizes in bytes, each once."""
    storages = [t.untyped_storage() for t in tensors if t.layout == torch.strided]
    return {s._cdata: s.nbytes() for s in storages}


def _bytes(streams: Streams) -> int:
    return sum(s.nbytes for s in streams)


def _without_graph(tensors: Streams, streams: Streams) -> Streams:
    return tuple([t if any(t is s for s in streams) else t.detach() for t in tensors])
