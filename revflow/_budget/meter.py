"""The memory that standard autograd would take for each block of a sequence, measured in a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from revflow._base.streams import Streams
from revflow._base.torch_private import is_compiled
from revflow._budget.costs import Cost
from revflow._budget.recording import Recording, storages, without_graph
from revflow._budget.work import OPERATIONS_PER_BYTE


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
        self._given = storages(given)
        self._makers: dict[int, int] = {}
        """The block that made each of the present streams, by the address of the stream's storage."""
        self._recording = Recording(())
        self._saved: dict[int, int] = {}
        """Storages that this block's graph saves, with their sizes in bytes."""
        self._transients: list[int] = []
        self._gradients: list[int] = []
        """By conditioner of this block: temporary bytes of its inversion, and the largest gradient among them."""
        self._output = self._spared = 0
        """Of this block."""

    def first(self, call: MeasuredBlock, streams: Streams, leaves: Sequence[Tensor]) -> tuple[Streams, Streams]:
        """The result of `call.first`, which is measured."""
        known = self._given.keys() | storages([*streams, *leaves, *call.parameters]).keys()
        self._saved, self._transients, self._gradients, self._output, self._spared = {}, [], [], 0, 0
        self._recording = Recording(known, any(is_compiled(m) for part in call.replays for m in part.modules))
        with self._recording.running():
            outputs, kept = call.first(streams, leaves)
        results = outputs[: len(outputs) - call.passage.log_det]
        self._count_saved_streams(streams)
        self.costs.append(self._cost(call, streams, results, kept))
        here = len(self.costs) - 1
        self._makers = {key: self._makers.get(key, here) for key in storages(results) if key not in self._saved}
        return without_graph(outputs, streams), without_graph(kept, streams)

    def _count_saved_streams(self, streams: Streams) -> None:
        """Standard autograd stores a stream if a later block's graph saves it. It counts for the block that made it."""
        for key, size in storages(streams).items():
            if key in self._recording.known_saved and key in self._makers:
                maker = self._makers.pop(key)
                self.costs[maker] = self.costs[maker]._replace(made=self.costs[maker].made + size)

    def _cost(self, call: MeasuredBlock, streams: Streams, results: Streams, anchors: Streams) -> Cost:
        if not self._transients:
            # A block without conditioners. During its inversion, the results of the inverse exist next to its second output.
            self.step(results, _nbytes(streams))
        slices = len(self._transients) // len(call.replays)  # Micro-batches per conditioner.
        made = sum([size for key, size in storages(results).items() if key not in storages(streams)])
        joined_gradients = made if slices > 1 else 0  # The gradients of the micro-batches are concatenated.
        return Cost(
            call.position,
            call.block_type,
            graph=sum(self._saved.values()),
            made=0,
            inputs=_nbytes(streams),
            outputs=_nbytes(results),
            anchors=_nbytes(anchors),
            transient=max(self._transients) + joined_gradients,
            gradient=max(self._gradients) * slices,
            work=self._recording.work or OPERATIONS_PER_BYTE * sum(self._saved.values()),
            output=self._output if self._spared else 0,
            spared=self._spared,
        )

    def evaluation(self, evaluate: Callable[..., Streams], can_be_kept: bool, *arguments: Any) -> Streams:
        """The coefficients that a conditioner returns. Measures what storing them takes, and what it spares."""
        recording = self._recording
        recording.is_read, recording.at_last_save = False, recording.work
        t = evaluate(*arguments)
        spared = recording.work - recording.at_last_save
        if spared and can_be_kept and not recording.is_read:
            self._spared += spared
            self._output += sum(storages(t).values())
        return t

    def uncounted(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call `function`, whose work is not part of a forward pass: it is a check of the engine."""
        with self._recording.uncounted():
            function(*arguments)

    def step(self, t: Streams, temporary: int) -> None:
        """A conditioner has returned `t`. `temporary`: bytes needed to apply these values to the stream and to invert that."""
        saved = self._recording.section()
        self._saved |= saved
        values = sum([size for key, size in storages(t).items() if key not in saved])
        gradient = max(saved.values(), default=0)
        self._gradients.append(gradient)
        self._transients.append(sum(saved.values()) + max(gradient, values + temporary))


def _nbytes(streams: Streams) -> int:
    """Their bytes, without those that a view leaves out."""
    return sum([s.nbytes for s in streams])
