"""A conditioner evaluated in micro-batches: only the activations of one micro-batch exist at a time.

Both evaluations are made so: they get tensors of the same shapes, and draw the same random numbers. Streams are sliced along
dimension 0, and so are tensors among the keyword arguments. Those with one entry, or without dimensions, go to every slice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from revflow._base.streams import Gradients, Streams
from revflow._base.torch_private import BatchNorm, FakeTensor
from revflow._replay.attributes import Attributes
from revflow._replay.random_states import random_states
from revflow._replay.replay import Replay
from revflow._rewind.conditioner import ConditionerCall
from revflow._rewind.graph import is_ours, plus
from revflow._rewind.laws import Law
from revflow._rewind.passage import RewindInputs
from revflow._rewind.tape import Tape

_MIXING = 1e-3
"""The largest effect of one sample on another that counts as rounding, relative to the largest value."""


class SlicedCall(ConditionerCall):
    """A conditioner's call in slices, each of which is a call of the base class."""

    def __init__(self, law: Law, tape: Tape, target: int, conditioner: nn.Module, streams: Streams, key: str) -> None:
        device = streams[0].device
        super().__init__(law, tape, target, conditioner, device)
        for module in self.modules:
            if isinstance(module, BatchNorm) and (module.training or module.running_mean is None):
                which = "in train mode" if module.training else "without running statistics"
                raise ValueError(f"chunks={tape.chunks}: a {type(module).__name__} {which} {_MIXES}")
        self._key = key
        self._size = _batch_size(streams)
        length = max(1, -(-self._size // tape.chunks))
        self._slices = [
            (slice(begin, begin + length), ConditionerCall(law, tape, target, conditioner, device))
            for begin in range(0, max(1, self._size), length)
        ]
        if not law.stores_target:
            self.stores *= len(self._slices)

    def moved(self) -> list[Tensor]:
        return [value for _, call in self._slices for value in call.moved()]

    def recall(self, moved: Sequence[Tensor]) -> Sequence[Tensor]:
        for _, call in self._slices:
            moved = call.recall(moved)
        return moved

    def run(self, now: list[Tensor], leaves: Sequence[Tensor]) -> tuple[Streams, Tensor | None]:
        if self._tape.meter is None:
            self._refuse_mixing(now, leaves)
        else:
            self._tape.meter.uncounted(self._refuse_mixing, now, leaves)
        x = now[self.target]
        stored: Streams = ()
        targets: list[Tensor] = []
        log_dets: list[Tensor] = []
        for part, call in self._slices:
            piece = [s[part] for s in now]
            if self._tape.meter is None:  # the inputs of a Function may require gradients, its slices must not
                piece = [s.detach() for s in piece]
            its_stored, log_det = call.run(piece, self._cut(leaves, part))
            stored += its_stored
            targets.append(piece[self.target])
            if log_det is not None:
                log_dets.append(log_det)
        now[self.target] = torch.cat(targets)
        return (x,) if self.law.stores_target else stored, torch.cat(log_dets) if log_dets else None

    def undo(self, now: list[Tensor], grads: list[Tensor | None], given: RewindInputs) -> Gradients:
        k, y = self.target, now[self.target]
        x = _Gathered(self._size, given.stored[0].detach() if self.law.stores_target else y if is_ours(y) else None)
        # A law that adds does not change the gradient of its target.
        changed = [j for j in range(len(now)) if j != k or not self.law.translates]
        stream_grads = [_Gathered(self._size) for _ in changed]
        leaf_grads = [_Gathered(self._size) if self._is_cut(leaf) else _Sum() for leaf in given.leaves]
        own_grads = [_Sum() for _ in given.own]
        for i, (part, call) in enumerate(self._slices):
            piece = [s[part] for s in now]
            its_grads = [None if g is None else g[part] for g in grads]
            call.place, call.is_followed = self.place, self.is_followed
            found = call.undo(piece, its_grads, self._given(given, i))
            if not self.law.stores_target:
                x.put(part, piece[k])
            for j, gathered in zip(changed, stream_grads, strict=True):
                gathered.put(part, its_grads[j])
            for whole, gradient in zip((*leaf_grads, *own_grads), found, strict=True):
                whole.put(part, gradient)
        assert x.value is not None
        now[k] = x.value
        for j, gathered in zip(changed, stream_grads, strict=True):
            grads[j] = gathered.value
        return [g.value for g in (*leaf_grads, *own_grads)]

    def _given(self, given: RewindInputs, i: int) -> RewindInputs:
        """The inputs of the i-th slice's inversion."""
        part, call = self._slices[i]
        count = call.stores
        stored = (given.stored[0][part],) if self.law.stores_target else given.stored[i * count : (i + 1) * count]
        grads = [None if g is None else g[part] for g in given.grads]
        return given._replace(grads=grads, leaves=self._cut(given.leaves, part), stored=stored)

    def _cut(self, leaves: Sequence[Tensor], part: slice) -> list[Tensor]:
        """The tensors among the keyword arguments for a slice, as leaves of their own."""
        return [
            leaf.detach()[part].requires_grad_(leaf.requires_grad) if self._is_cut(leaf) else leaf for leaf in leaves
        ]

    def _is_cut(self, leaf: Tensor) -> bool:
        if leaf.dim() == 0 or len(leaf) == 1 != self._size:
            return False
        if len(leaf) == self._size:
            return True
        raise ValueError(
            f"chunks: tensors among the keyword arguments need one entry per sample ({self._size}), or one for all, in their "
            f"first dimension; got one of shape {tuple(leaf.shape)}"
        )

    @torch.no_grad()  # gradients are on while the pass is measured
    def _refuse_mixing(self, now: list[Tensor], leaves: Sequence[Tensor]) -> None:
        """Refuse a conditioner in which the samples of a batch depend on each other. This is checked once.

        The result for a first sample must not change with the second sample. If that result is zero, as often before training,
        the check decides nothing, and the next pass repeats it.
        """
        witness = self._tape.witness
        if witness is None or self._size < 2 or _is_hidden(now) or not witness.close_looks.looks(self._key, self, 1):
            return
        k, two = self.target, slice(0, 2)
        pieces = [s[two].detach() for s in now]
        target, others, context = pieces[k], pieces[:k] + pieces[k + 1 :], self._cut(leaves, two)
        strangers = [torch.cat((s[:1], 1 - s[1:])) if s.is_floating_point() else s for s in others]
        # Of the values among the keyword arguments, only the first sample's own are certain to be valid for another sample.
        its_own = [
            torch.cat((c[:1], c[:1])) if self._is_cut(leaf) else c for c, leaf in zip(context, leaves, strict=True)
        ]
        replay = Replay(self._conditioner, target.device)
        replay.random = random_states(target.device)
        parameters, evaluate = replay.parameters, self.law.block.evaluate

        def evaluate_with(streams: list[Tensor], tensors: Sequence[Tensor]) -> Streams:
            filled = self._tape.arguments.filled(tensors)
            with witness.close_looks.remember():  # the slices may read a cache that this evaluation filled
                return replay.values(parameters, evaluate, self._conditioner, target, streams, filled)

        attributes = Attributes(self._foreign)
        before, after = evaluate_with(others, context), evaluate_with(strangers, its_own)
        self._refuse_ambiguous(leaves, context, before, lambda tensors: evaluate_with(others, tensors))
        attributes.keep_changes()
        attributes.lend()  # restores them as they were before this check
        for a, b in zip(before, after, strict=True):
            if _largest(a[0] - b[0]) > _MIXING * _largest(a[0]):
                raise ValueError(
                    f"chunks={self._tape.chunks}: the conditioner {type(self._conditioner).__name__} {_MIXES}"
                )
        if any(_largest(a[0]) > 0 for a in before):
            witness.close_looks.has_looked(self._key, self)

    def _refuse_ambiguous(
        self,
        leaves: Sequence[Tensor],
        cut: Sequence[Tensor],
        expected: Streams,
        evaluate: Callable[[Sequence[Tensor]], Streams],
    ) -> None:
        """Refuse a keyword tensor that is as long as the batch only by coincidence.

        The conditioner then also accepts the whole tensor, and its result differs from that for a slice.
        """
        for i, leaf in enumerate(leaves):
            if self._size < 3 or not self._is_cut(leaf):
                continue
            try:
                whole = evaluate([*cut[:i], leaf, *cut[i + 1 :]])
            except (RuntimeError, ValueError, IndexError):
                continue  # the conditioner needs one entry per sample
            if any(_largest(a - b) > _MIXING * _largest(a) for a, b in zip(expected, whole, strict=True)):
                raise ValueError(
                    f"chunks: a keyword tensor of shape {tuple(leaf.shape)} has as many entries as the batch has samples, but "
                    f"the conditioner also takes it whole: if it is for all samples, pass it with a first dimension of 1 "
                    f"(tensor[None]); if its values are mixed over the batch, leave out chunks"
                )


def _batch_size(streams: Streams) -> int:
    sizes = {s.shape[0] if s.dim() else None for s in streams}
    if len(sizes) > 1 or None in sizes:
        shapes = ", ".join(str(tuple(s.shape)) for s in streams)
        raise ValueError(f"chunks slices the first dimension, which must be the batch of every stream; got {shapes}")
    return len(streams[0])


def _largest(values: Tensor) -> float:
    return values.abs().max().item() if values.numel() else 0.0


def _is_hidden(streams: Sequence[Tensor]) -> bool:
    return any(isinstance(s, FakeTensor) or s.is_meta for s in streams)


class _Gathered:
    """A whole tensor, filled by slices. It is None if all of them are None; if only some are, it has zeros in their place."""

    def __init__(self, size: int, value: Tensor | None = None) -> None:
        self.size, self.value = size, value

    def put(self, part: slice, piece: Tensor | None) -> None:
        if piece is not None:
            if self.value is None:
                self.value = piece.new_zeros((self.size, *piece.shape[1:]))
            self.value[part] = piece


class _Sum:
    """The sum of all slices; None if all of them are None."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def put(self, part: slice, piece: Tensor | None) -> None:
        self.value = plus(self.value, piece)


_MIXES = (
    "mixes the samples of a batch, which would see only those of their slice: leave out chunks, or put it in eval mode if it "
    "does not do so there"
)
