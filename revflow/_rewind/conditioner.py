"""One conditioner's part in a block's pass: the stream that it overwrites, and how that is undone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from revflow._base.stepwise import Stepwise
from revflow._base.streams import Gradients, Streams, versions_of
from revflow._replay.replay import Replay
from revflow._rewind.graph import aliases_of, edges, gradients, is_ours, laid_out, leaf, not_leaves
from revflow._rewind.passage import Passage, changed, is_built_in, log_det_of, mapped
from revflow.exact import Residual

if TYPE_CHECKING:
    from revflow._guard.sequences import Seen

_RETURN = "Let a conditioner return it, as one more coefficient"


class RewindInputs(NamedTuple):
    """What a rewind is given, beside the block's output."""

    grads: Gradients
    """Of the output's streams, and of the log-determinant if there is one."""
    needs: tuple[bool, ...]
    """Which of the input's streams want a gradient."""
    leaves: list[Tensor]
    """They stand for the context's tensors."""
    own: list[Tensor]
    """The parameters."""
    kept: Streams
    """What `first` wished to keep."""
    seen: Seen | None
    """The guard's, to be told of outputs whose input is an anchor."""


class ConditionerStep(Replay):
    """One conditioner of a stepwise block, and the stream that it overwrites."""

    def __init__(self, block: Stepwise, passage: Passage, target: int, conditioner: nn.Module, device: torch.device):
        super().__init__(conditioner, device)
        self.target = target
        self._block, self._conditioner = block, conditioner
        self._inverse, self._grid = passage.inverse, passage.grid
        self.keeps_target = self._grid is None and block.ill_conditioned and not self._inverse
        self.keeps = 1 if self.keeps_target else 0 if self._grid is None or block.translates else len(Residual._fields)
        """How many tensors it keeps: its target as an anchor, a residual, or nothing."""
        self._layout: list[tuple[int, ...]] = []
        """The strides of the other streams; and last the target's, as they are after the step."""

    def run(self, passage: Passage, now: list[Tensor], leaves: Sequence[Tensor]) -> tuple[Streams, Tensor | None]:
        """Overwrite the target in `now`; returns what to keep for `undo`, and the log-determinant if wanted."""
        k, block, x = self.target, self._block, now[self.target]
        others = now[:k] + now[k + 1 :]
        taken = [*others, *leaves] if leaves else others
        versions = versions_of(taken)
        if not self.is_known:  # hooks that it registers on its arguments belong to this evaluation alone
            others, leaves = aliases_of(others), aliases_of(leaves)
        context = passage.arguments.filled(leaves)
        reachable = passage.arguments.watch(context)
        t = self.first(passage.draws, block.evaluate, self._conditioner, now[k], others, context)
        if reachable is not None:
            reachable.refuse_changes(self._conditioner)
        if versions_of(taken) != versions:
            raise RuntimeError(
                f"the conditioner {type(self._conditioner).__name__} changed its input in place (by a first layer with "
                f"inplace=True, say), which cannot be undone; let it work on a copy (inplace=False)"
            )
        version = x._version
        now[k] = y = changed(block, self._inverse, self._grid, x, t)
        if x._version != version:
            raise self._in_place("separate" if self._inverse else "combine")
        self._layout = [s.stride() for s in (*others, y)]
        if passage.extent is not None:
            passage.extent.see(y)
        kept: Streams = ()
        if self.keeps:
            with torch.no_grad():  # on where the pass is measured
                kept = (x,) if self._grid is None else self._grid.residual(x, self._estimate(y, t))
        log_det = log_det_of(block, self._inverse, y if self._inverse else x, t) if passage.log_det else None
        if passage.meter is not None:
            passage.meter.step(t, 0 if block.translates else 2 * y.nbytes)
        return kept, log_det

    def undo(self, passage: Passage, now: list[Tensor], grads: list[Tensor | None], given: RewindInputs) -> Gradients:
        """Bring the streams in `now`, and their gradients in `grads`, from after the step to before it.

        In `given` are this step's own parameters and what it kept, and of the gradients the log-determinant's alone. Returns
        the gradients of its leaves and parameters.
        """
        k, block = self.target, self._block
        inputs = [*map(leaf, now[:k] + now[k + 1 :], self._layout, given.needs[:k] + given.needs[k + 1 :])]
        wanted = (*inputs, *given.leaves, *given.own)
        others, leaves, followed = inputs, given.leaves, None
        if self.is_known:
            t = self._evaluated(passage, now[k], others, leaves, given.own)
        else:
            others, leaves = not_leaves(inputs), not_leaves(leaves)
            followed = None if given.seen is None else given.seen.follow(self)
            with followed or nullcontext():
                t = self._evaluated(passage, now[k], others, leaves, given.own)
            if given.seen is not None:
                given.seen.graph("a conditioner", t, wanted, self._conditioner, passage.arguments)
        # The other streams are outputs too: so autograd adds the gradients that each gets on both ways, and in the same order
        # as without an engine.
        other_grads = grads[:k] + grads[k + 1 :]
        if block.translates:
            now[k] = self._before(now[k], t, given.kept)
            ends = edges((*t, *others))
            del t  # a stream's worth for each coefficient, unless the graph needs it too
            y_grad = grads[k]
            if self._inverse and y_grad is not None:
                y_grad = -y_grad
            found = gradients(ends, wanted, (y_grad, *other_grads))
        else:
            x, again = self._combined(now, t, given)
            if given.seen is not None and not is_built_in(block):
                given.seen.graph("separate" if self._inverse else "combine", again, (x, *wanted), remedy=_RETURN)
            ends = edges((*again, *others))
            del t, again
            grads[k], *found = gradients(ends, (x, *wanted), (grads[k], *given.grads, *other_grads))
        del ends, others, leaves  # what is left of the graph
        if given.seen is not None and not self.is_known:
            given.seen.escapes(followed, self)
        grads[:k], grads[k + 1 :] = found[:k], found[k : len(inputs)]
        return found[len(inputs) :]

    def _evaluated(
        self, passage: Passage, target: Tensor, others: list[Tensor], leaves: list[Tensor], own: list[Tensor]
    ) -> Streams:
        """The coefficients, with a graph."""
        context = passage.arguments.filled(leaves)
        return self.again(own, self._block.evaluate, self._conditioner, target, others, context)

    def _combined(self, now: list[Tensor], t: Streams, given: RewindInputs) -> tuple[Tensor, Streams]:
        """Take the step back in `now`; the target before it, as a leaf, and what the step makes of that, with a graph."""
        k, block = self.target, self._block
        y = now[k] if self.keeps_target else None  # else it is let go
        now[k] = self._before(now[k], t, given.kept)
        with torch.enable_grad():
            x = now[k].detach().requires_grad_()
            result = mapped(block, self._inverse, x, t)
            if not result.requires_grad:
                name = "separate" if self._inverse else "combine"
                raise RuntimeError(
                    f"{type(block).__name__}.{name} returned a tensor that does not depend on x for autograd"
                )
            again: Streams = (result,)
            if given.grads:
                inner = x if not self._inverse else result if self._grid is None else self._grid.round(result)
                again = (result, log_det_of(block, self._inverse, inner, t))
        if y is not None and given.seen is not None:
            given.seen.output(y, again[0])
        return x, again

    def _before(self, y: Tensor, t: Streams, kept: Streams) -> Tensor:
        """The target before the step, from the step's output; gradients are off here."""
        if self.keeps_target:
            return kept[0].detach()  # an alias: `is_ours` counts those, and the saved one is another backward's too
        if self.keeps:
            assert self._grid is not None
            estimate = self._estimate(laid_out(y, self._layout[-1]), t)
            return self._grid.restore(estimate, Residual(*kept))
        if not (self._block.translates and type(y) is type(t[0]) and is_ours(y)):  # a subclass would make another of y
            return self._estimate(y, t)
        if self._grid is not None:
            return self._grid.add_(y, *t) if self._inverse else self._grid.take_back_(y, *t)
        return y.add_(*t) if self._inverse else y.sub_(*t)

    def _estimate(self, y: Tensor, t: Streams) -> Tensor:
        """The target before the step, as far as the step's output and its coefficients tell; on a grid, if it adds, exact."""
        version = y._version
        x = changed(self._block, not self._inverse, self._grid, y, t)
        if y._version != version:
            raise self._in_place("combine" if self._inverse else "separate")
        return x

    def _in_place(self, name: str) -> RuntimeError:
        return RuntimeError(
            f"{type(self._block).__name__}.{name} changed its arguments in place, which are still needed: let it return a new "
            f"tensor"
        )
