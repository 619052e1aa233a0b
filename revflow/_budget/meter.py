"""The memory that standard autograd would take for each block, and the block's work, measured in a forward pass.

Each block runs with a graph. Hooks count the tensors that the graph saves, and drop them after each conditioner, so that the
measurement itself takes little memory. A mode counts the work of all operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from revflow._base.streams import Streams
from revflow._base.torch_private import is_compiled
from revflow._budget.costs import Cost
from revflow._budget.work import OPERATIONS_PER_BYTE, Work
from revflow._replay.mode import ordinary_autograd


class MeasuredPart(Protocol):
    """A part of a block: the evaluation of one conditioner, or of the block as a whole."""

    modules: list[nn.Module]


class MeasuredBlock(Protocol):
    """The interface through which a meter runs a block; `_rewind.blocks.BlockCall` implements it."""

    position: str
    block_type: str
    parameters: list[Tensor]
    passage: Any

    @property
    def replays(self) -> Sequence[MeasuredPart]: ...

    def first(self, streams: Streams, leaves: Sequence[Tensor]) -> tuple[Streams, Streams]: ...


class Meter:
    """Measures one forward pass through a sequence of blocks."""

    def __init__(self, given: Iterable[Tensor]) -> None:
        """`given`: tensors that exist before the pass and do not count: parameters, buffers, context."""
        self.costs: list[Cost] = []
        """By block, in the order in which the blocks ran."""
        self._given = _storages(given)
        self._saved: dict[int, int] = {}
        """Storages that this block's graph saves, with their sizes in bytes."""
        self._of_conditioner: dict[int, int] = {}
        """Those of the conditioner that runs now."""
        self._transients: list[int] = []
        self._gradients: list[int] = []
        """By conditioner of this block: temporary bytes of its inversion, and the largest gradient among them."""
        self._work = Work()
        self._at_last_save = 0
        """The work done when a conditioner's graph saved its last tensor."""
        self._is_read = False
        """Whether a conditioner differentiates something itself, and so reads the graph's tensors in its evaluation."""
        self._output = self._spared = 0
        """Of this block."""
        self._held: list[list[Tensor]] = []
        """The tensors that the conditioner's graph holds, each in a list that can be emptied."""
        self._counted: list[StorageWeakRef] = []
        """References that keep a new storage from getting the address of a freed one: both would count as one."""

    def first(self, call: MeasuredBlock, streams: Streams, leaves: Sequence[Tensor]) -> tuple[Streams, Streams]:
        """The result of `call.first`, which is measured."""
        known = self._given.keys() | _storages([*streams, *leaves, *call.parameters]).keys()
        self._saved, self._of_conditioner, self._transients, self._gradients = {}, {}, [], []
        self._counted.clear()
        self._work, self._output, self._spared = Work(), 0, 0
        is_opaque = any(is_compiled(module) for part in call.replays for module in part.modules)

        def pack(tensor: Tensor) -> list[Tensor]:
            new = {key: size for key, size in _storages([tensor]).items() if key not in known}
            self._of_conditioner.update(new)
            self._at_last_save = self._work.total
            if tensor.layout == torch.strided:
                self._counted.append(StorageWeakRef(tensor.untyped_storage()))
            self._held.append([tensor.detach()])  # An alias, because the tensor itself may refer to the graph.
            return self._held[-1]

        def unpack(held: list[Tensor]) -> Tensor:
            self._is_read = True
            return held[0]

        # In the second evaluation of a conditioner, a sequence inside it stores everything. So it must here.
        # The mode would make dynamo compile a block once more.
        counting = nullcontext() if is_opaque else self._work
        with ordinary_autograd(), torch.enable_grad(), saved_tensors_hooks(pack, unpack), counting:
            outputs, kept = call.first(streams, leaves)
        results = outputs[: len(outputs) - call.passage.log_det]
        self.costs.append(self._cost(call, streams, results, kept))
        return _without_graph(outputs, streams), _without_graph(kept, streams)

    def _cost(self, call: MeasuredBlock, streams: Streams, results: Streams, anchors: Streams) -> Cost:
        made = {key: size for key, size in _storages(results).items() if key not in _storages(streams)}
        if not self._transients:
            # A block without conditioners. During its inversion, the results of the inverse exist next to its second output.
            self.step(results, _nbytes(streams))
        slices = len(self._transients) // len(call.replays)  # Micro-batches per conditioner.
        joined_gradients = (
            sum(made.values()) if slices > 1 else 0
        )  # The gradients of the micro-batches are concatenated.
        return Cost(
            call.position,
            call.block_type,
            graph=sum(self._saved.values()),
            made=sum(size for key, size in made.items() if key not in self._saved),
            inputs=_nbytes(streams),
            outputs=_nbytes(results),
            anchors=_nbytes(anchors),
            transient=max(self._transients) + joined_gradients,
            gradient=max(self._gradients) * slices,
            work=self._work.total or OPERATIONS_PER_BYTE * sum(self._saved.values()),
            output=self._output if self._spared else 0,
            spared=self._spared,
        )

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """A context whose work does not count: that of a check which later steps do not repeat."""
        before = self._work.total
        yield
        self._work.total = before

    def evaluation(self, evaluate: Callable[..., Streams], can_be_kept: bool, *arguments: Any) -> Streams:
        """The coefficients that a conditioner returns. Measures what storing them takes, and what it spares."""
        self._is_read, self._at_last_save = False, self._work.total
        t = evaluate(*arguments)
        spared = self._work.total - self._at_last_save
        if spared and can_be_kept and not self._is_read:
            self._spared += spared
            self._output += sum(_storages(t).values())
        return t

    def step(self, t: Streams, temporary: int) -> None:
        """A conditioner has returned `t`. `temporary`: bytes needed to apply these values to the stream and to invert that."""
        saved, self._of_conditioner = self._of_conditioner, {}
        self._saved |= saved
        # No backward pass follows, so the graph need not hold the tensors. Those of many micro-batches would pile up.
        for held in self._held:
            held.clear()
        self._held.clear()
        values = sum(size for key, size in _storages(t).items() if key not in saved)
        gradient = max(saved.values(), default=0)
        self._gradients.append(gradient)
        self._transients.append(sum(saved.values()) + max(gradient, values + temporary))


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """The size in bytes of each storage, by its address."""
    storages = [t.untyped_storage() for t in tensors if t.layout == torch.strided]
    return {s._cdata: s.nbytes() for s in storages}


def _nbytes(streams: Streams) -> int:
    """Their bytes, without those that a view leaves out."""
    return sum(s.nbytes for s in streams)


def _without_graph(tensors: Streams, streams: Streams) -> Streams:
    """The tensors, detached; a block's input streams as they are."""
    return tuple([t if any(t is s for s in streams) else t.detach() for t in tensors])
