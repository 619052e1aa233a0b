"""One conditioner's part in the pass through a coupling: the stream that it changes, and the inversion of that change.

In the forward pass the conditioner is evaluated without a graph. In the backward pass it is evaluated again, with one: the
value inverts the change, the graph gives the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from revflow._base.streams import Gradients, Streams, versions_of
from revflow._replay.replay import Replay
from revflow._rewind.graph import aliases_of, edges, gradients, is_ours, laid_out, leaf, not_leaves
from revflow._rewind.laws import Law
from revflow._rewind.passage import RewindInputs, is_built_in
from revflow._rewind.skeleton import Capture, Skeleton, can_keep
from revflow._rewind.tape import Tape

if TYPE_CHECKING:
    from revflow._guard.escapes import SecondRecorder

_RETURN = "Let a conditioner return it, as one more coefficient"


class ConditionerCall(Replay):
    """A conditioner in one call: its evaluation in both passes, and the change that it makes to its target stream."""

    skeleton: Skeleton | None = None
    """The graph of the first evaluation if the coefficients are stored."""

    def __init__(self, law: Law, tape: Tape, target: int, conditioner: nn.Module, device: torch.device) -> None:
        super().__init__(conditioner, device)
        self.target, self.law, self.is_foreign = target, law, not self.is_known
        self.stores = law.stores
        """The number of tensors that `run` stores."""
        self._tape, self._conditioner = tape, conditioner
        self._strides: list[tuple[int, ...]] = []
        """Of the other streams, and last of the target, as it is after the change."""

    def run(self, now: list[Tensor], leaves: Sequence[Tensor]) -> tuple[Streams, Tensor | None]:
        """Change the target in `now`; return the tensors that `undo` needs, and the log-determinant if that is computed."""
        k, law, tape, x = self.target, self.law, self._tape, now[self.target]
        others = now[:k] + now[k + 1 :]
        taken = [*others, *leaves] if leaves else others
        versions = versions_of(taken)
        evaluate = law.block.evaluate
        if tape.keeps_outputs or tape.meter is not None:
            evaluate, others, leaves = self._prepared(others, leaves)
        if not self.is_known and self.skeleton is None:
            # It may register hooks on its arguments, which belong only to this evaluation.
            others, leaves = aliases_of(others), aliases_of(leaves)
        context = tape.arguments.filled(leaves)
        reachable = tape.arguments.watch(context)
        t = coefficients = self.first(tape.draws, evaluate, self._conditioner, x, others, context)
        if reachable is not None:
            reachable.refuse_changes(self._conditioner)
        if versions_of(taken) != versions:
            raise RuntimeError(
                f"the conditioner {type(self._conditioner).__name__} changed its input in place (for example by a first "
                f"layer with inplace=True), which cannot be inverted; let it work on a copy (inplace=False)"
            )
        if self.skeleton is not None:
            t = tuple([c.detach() for c in t])  # so that the streams do not refer to the skeleton
        now[k] = y = law.apply(x, *t)
        self._strides = [s.stride() for s in (*others, y)]
        if law.arithmetic.extent is not None:
            law.arithmetic.extent.see(y)
        if tape.meter is not None:
            tape.meter.step(t, 0 if law.translates else 2 * y.nbytes)
        stored: Streams = (x,) if law.stores_target else ()
        if law.stores and not stored:
            with torch.no_grad():  # gradients are on while the pass is measured
                stored = law.arithmetic.residual(x, law.undo(y, *t))
        if self.skeleton is not None:
            stored += self._kept(self.skeleton, coefficients)
        return stored, law.log_det(x, y, t) if law.computes_log_det else None

    def _prepared(
        self, others: list[Tensor], leaves: Sequence[Tensor]
    ) -> tuple[Callable[..., Streams], list[Tensor], Sequence[Tensor]]:
        """The first evaluation, with its inputs, if it is measured or builds a skeleton."""
        tape, evaluate = self._tape, self.law.block.evaluate
        can_be_kept = tape.chunks == 1 and can_keep(self, others, leaves)
        if tape.meter is not None:
            return partial(tape.meter.evaluation, evaluate, can_be_kept), others, leaves
        if not can_be_kept:
            return evaluate, others, leaves
        skeleton = self.skeleton = Skeleton(self, tape.witness is not None)
        return partial(skeleton.first, evaluate), *skeleton.entered(others, leaves)

    def _kept(self, skeleton: Skeleton, coefficients: Streams) -> Streams:
        """The stored coefficients, with their graph, and the guard's few values: `undo` needs both.

        Autograd saves them. So the skeleton is freed with the sequence's graph.
        """
        law, witness = self.law, self._tape.witness
        if versions_of(coefficients) != skeleton.versions:
            raise RuntimeError(
                f"{type(law.block).__name__}.{law.direction.apply} changed its arguments in place, which are still needed: let "
                f"it return a new tensor"
            )
        if not any(c.requires_grad for c in coefficients):
            self.skeleton = None
            return ()
        samples = () if witness is None else witness.activations(skeleton.last_saved())
        self.stores = law.stores + len(coefficients) + len(samples)
        return *coefficients, *samples

    def undo(self, now: list[Tensor], grads: list[Tensor | None], given: RewindInputs) -> Gradients:
        """Bring the streams in `now`, and their gradients in `grads`, from after the change to before it.

        `given` holds the parameters and the stored tensors of this conditioner, and only the log-determinant's gradient. Returns
        the gradients of its leaves and parameters.
        """
        k = self.target
        inputs = [*map(leaf, now[:k] + now[k + 1 :], self._strides, given.needs[:k] + given.needs[k + 1 :])]
        wanted, filled = (*inputs, *given.leaves, *given.own), None
        if self.skeleton is not None:
            kept, given = given.stored[self.law.stores :], given._replace(stored=given.stored[: self.law.stores])
            filled = self._filled(now[k], inputs, kept, given)
        if filled is not None:
            t, inputs, wanted, followed, _ = filled
            others = inputs
        elif self.is_known:
            t, others, followed = self._evaluated(now[k], inputs, given.leaves, given.own), inputs, None
        else:
            t, others, followed = self._observed(now[k], inputs, given)
        through = self._through_translation if self.law.translates else self._through_map
        targets, outputs, output_grads = through(now, grads[k], t, given)
        if targets and given.seen is not None and not is_built_in(self.law.block):
            known = () if self.skeleton is None else (self.skeleton.token,)
            given.seen.graph(self.law.direction.apply, outputs, (*targets, *wanted, *known), remedy=_RETURN)
        # The other streams are outputs too. So autograd itself adds the gradients that each gets on both ways, in the same
        # order as without the engine.
        ends = edges((*outputs, *others))
        output_grads += (*grads[:k], *grads[k + 1 :])
        del t, outputs, others  # their values are freed unless the graph needs them
        found = gradients(ends, (*targets, *wanted), output_grads, filled is not None)
        del ends, filled  # and with them the rest of the graph
        if given.seen is not None and not self.is_known:
            given.seen.escapes(followed, self)
        if targets:
            grads[k], *found = found
        grads[:k], grads[k + 1 :] = found[:k], found[k : len(inputs)]
        return found[len(inputs) :]

    def _evaluated(self, target: Tensor, others: list[Tensor], leaves: list[Tensor], own: list[Tensor]) -> Streams:
        """The coefficients, with a graph."""
        context = self._tape.arguments.filled(leaves)
        return self.again(own, self.law.block.evaluate, self._conditioner, target, others, context)

    def _observed(
        self, target: Tensor, inputs: list[Tensor], given: RewindInputs
    ) -> tuple[Streams, list[Tensor], SecondRecorder | None]:
        """The same of a conditioner that consists of other modules than PyTorch's own, observed by the guard.

        Also returns the conditioner's inputs, and the guard's record of the tensors that it made.
        """
        others, leaves, seen = not_leaves(inputs), not_leaves(given.leaves), given.seen
        followed = None if seen is None else seen.follow(self)
        with followed or nullcontext():
            t = self._evaluated(target, others, leaves, given.own)
        if seen is not None:
            wanted = (*inputs, *given.leaves, *given.own)
            seen.graph("a conditioner", t, wanted, self._conditioner, self._tape.arguments)
        return t, others, followed

    def _filled(
        self, target: Tensor, inputs: list[Tensor], kept: Streams, given: RewindInputs
    ) -> tuple[Streams, list[Tensor], Streams, SecondRecorder | None, Capture] | None:
        """The second evaluation if the coefficients are stored: it only fills in their graph.

        Returns the coefficients, the places in the graph where the gradients of the other streams and of all inputs arrive, the
        guard's record, and what must exist until the gradients are computed. None if the graph cannot be filled in: the
        evaluation saves other tensors than the first one, or hooks such as those of `save_on_cpu` have removed the graph. The
        coefficients are then computed again, as those that are not stored.
        """
        skeleton, seen, conditioner = self.skeleton, given.seen, self._conditioner
        assert skeleton is not None
        t, samples = kept[: skeleton.count], kept[skeleton.count :]
        if not (any([c.requires_grad for c in t]) and skeleton.fits(inputs, given.leaves, given.own)):
            return None
        followed = None if seen is None or self.is_known else seen.follow(self)
        others, leaves = skeleton.entered_again(inputs, given.leaves)
        context = self._tape.arguments.filled(leaves)
        evaluate = partial(skeleton.again, self.law.block.evaluate)
        with followed or nullcontext():
            capture = self.again(given.own, evaluate, conditioner, target, others, context)
        if capture is None:
            return None
        if seen is not None:
            if not self.is_known:
                seen.graph("a conditioner", t, (*given.own, skeleton.token), conditioner, self._tape.arguments)
            seen.activations(samples, [capture.taken[n][0] for n in skeleton.compared], t)  # type: ignore[index]
        entrances, of_leaves = skeleton.entrances(inputs, given.leaves)
        return t, entrances, (*entrances, *of_leaves, *given.own), followed, capture

    def _through_translation(
        self, now: list[Tensor], grad: Tensor | None, t: Streams, given: RewindInputs
    ) -> tuple[Streams, Streams, tuple[Tensor | None, ...]]:
        """Invert the change in `now`. The gradient passes to the target as it is, and to the coefficient up to its sign.

        Returns the leaf of the target (here there is none), the outputs from which a backward pass begins, and their gradients.
        """
        k, law, y = self.target, self.law, now[self.target]
        in_place = type(y) is type(t[0]) and is_ours(y)  # in place, the result of a subclass would be of another type
        now[k] = (law.undo_ if in_place else law.undo)(y, *t)
        return (), t, (grad if grad is None or law.direction.sign > 0 else -grad,)

    def _through_map(
        self, now: list[Tensor], grad: Tensor | None, t: Streams, given: RewindInputs
    ) -> tuple[Streams, Streams, tuple[Tensor | None, ...]]:
        """The same for any other map, whose gradients come from its own graph. The outputs are the target, changed again, and
        its log-determinant."""
        k, law = self.target, self.law
        y = now[k] if law.stores_target else None  # otherwise it is freed
        now[k] = self._before(now[k], t, given.stored)
        with torch.enable_grad():
            x = now[k].detach().requires_grad_()
            again: Streams = (law.mapped(law.direction.apply, x, t),)
            if not again[0].requires_grad:
                raise RuntimeError(
                    f"{type(law.block).__name__}.{law.direction.apply} returned a tensor that does not depend on x for autograd"
                )
            if given.grads:
                changed = again[0] if law.direction.sign > 0 else law.arithmetic.round(again[0])
                again += (law.log_det(x, changed, t),)
        if y is not None and given.seen is not None:
            given.seen.output(y, again[0])
        return (x,), again, (grad, *given.grads)

    def _before(self, y: Tensor, t: Streams, stored: Streams) -> Tensor:
        """The target before the change; gradients are off here."""
        law = self.law
        if law.stores_target:
            # An alias, by which `is_ours` finds that it must not be overwritten: another backward pass may need the stored one.
            return stored[0].detach()
        if law.stores:
            return law.arithmetic.restored(law.undo(laid_out(y, self._strides[-1]), *t), stored)
        return law.undo(y, *t)
