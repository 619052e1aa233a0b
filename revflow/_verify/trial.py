"""One training step with the engine, one under standard autograd and one with checkpointing, on copies of a network."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from revflow._base.stepwise import Stepwise
from revflow._guard.policy import Guard, ReconstructionWarning
from revflow._replay.holders import copied
from revflow._replay.undisturbed import undisturbed
from revflow._verify.checkpointing import Checkpointing
from revflow._verify.comparison import Comparison
from revflow._verify.costs import Costs, Measured
from revflow._verify.inspection import Inspection, Worst, named_blocks, seeded, sequences_in
from revflow._verify.step import Arguments, with_leaves, worst_of
from revflow._verify.verification import Verification
from revflow.recurrence import ReversibleRecurrence
from revflow.sequence import ReversibleSequence


class Trial:
    """Compares training steps with the engine and under standard autograd, and collects the problems and notes."""

    def __init__(self, net: nn.Module, arguments: Arguments) -> None:
        self._net, self._arguments = net, arguments
        self._comparison = Comparison(net, arguments)
        self._device, self._tolerance = self._comparison.device, self._comparison.tolerance
        self._problems, self._notes = self._comparison.problems, self._comparison.notes

    def report(self) -> Verification:
        """Run all checks and measurements."""
        blocks = Inspection(self._device, self._tolerance)
        reconstruction = blocks.check(self._net, self._arguments)
        self._problems += blocks.problems
        self._notes += blocks.notes
        evaluations: dict[str, int] = {}
        with seeded(self._device):
            gradients = self._compare_gradients(evaluations, reconstruction)
            if not self._problems:
                self._train_with_guards()
            checkpointing = None if gradients is None else self._checkpointing()
        costs = Costs(self._copy, self._arguments, self._device)
        measured = Measured() if gradients is None else costs.measured(checkpointing)
        return Verification(
            gradients=gradients or Worst(float("inf"), "there are none"),
            reconstruction=reconstruction,
            evaluations=evaluations,
            kept=measured.kept,
            peak=measured.peak,
            time=measured.time,
            checkpoint=measured.checkpoint,
            problems=tuple(self._problems),
            notes=tuple(self._notes),
        )

    def _checkpointing(self) -> Checkpointing | None:
        """Checkpointing of each block; None if the network has only one, or cannot be trained in this way, which is noted."""
        checkpointing = Checkpointing()
        net = copied(self._net)
        try:
            with checkpointing.of(net):
                found = self._comparison.gradients(net)
        except Exception as failure:  # of any kind, since the network's own code runs
            first, *_ = str(failure).splitlines() or [type(failure).__name__]
            self._notes.append(f"checkpointing each block fails: {first}")
            return None
        worst = worst_of(found, self._comparison.plain)
        if worst.error > 10 * self._tolerance.warn:
            self._notes.append(
                f"checkpointing each block is not measured, because it changes the gradient of {worst.where} by {worst.error:.1e}"
            )
            return None
        return checkpointing if checkpointing.count > 1 else None

    def _copy(self) -> nn.Module:
        """The network without guards. If it has a memory budget, its costs have been measured."""
        net = _unguarded(copied(self._net))
        with_budget = [m for m in net.modules() if isinstance(m, (ReversibleSequence, ReversibleRecurrence))]
        if any(m.memory_budget not in ("min", "max") for m in with_budget):
            (inputs, context), _ = with_leaves(self._arguments)
            with undisturbed(net, self._device):
                net(*inputs, **context)
        return net

    def _set_one_chunk(self, net: nn.Module) -> None:
        for sequence in sequences_in(net):
            if sequence.chunks > 1:
                self._notes.append(
                    "gradients are compared with chunks=1, because chunks draw random numbers in another order"
                )
                sequence.chunks = 1

    def _compare_gradients(self, evaluations: dict[str, int], reconstruction: Worst) -> Worst | None:
        """The largest error of a gradient, None if the backward pass fails. Counts the evaluations in `evaluations`."""
        net = self._copy()
        self._set_one_chunk(net)
        with _counted(net, evaluations):
            try:
                engine = self._comparison.gradients(net)
            except RuntimeError as failure:
                self._problems.append(f"the backward pass fails: {failure}")
                return None
        return self._comparison.compare(engine, reconstruction.error, ", and exact=True avoids it")

    def _train_with_guards(self) -> None:
        """Run a training step with guards; an error that they raise is a problem, a warning a note."""
        net = copied(self._net)
        for sequence in sequences_in(net):  # New guards: used ones no longer check each block closely.
            mode, exact = sequence._guard.mode, sequence._guard.exact
            sequence._guard = Guard("warn" if mode == "off" else mode, exact)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always", ReconstructionWarning)
            try:
                self._comparison.gradients(net)
            except RuntimeError as refusal:
                self._problems.append(f"the guard ends the training step: {refusal}")
        self._notes += [f"the guard warns: {w.message}" for w in warned if w.category is ReconstructionWarning]


def _unguarded(net: nn.Module) -> nn.Module:
    for sequence in sequences_in(net):
        sequence._guard = Guard("off")
    return net


@contextmanager
def _counted(net: nn.Module, counts: dict[str, int]) -> Iterator[None]:
    """Count evaluations in `counts`: of the conditioners of couplings, and of other blocks together with their inverses."""

    def count(name: str, *_: object) -> None:
        counts[name] = counts.get(name, 0) + 1

    hooks = []
    for name, block, _ in named_blocks(net):
        if isinstance(block, Stepwise):
            for child, module in block.named_children():
                hooks.append(module.register_forward_hook(partial(count, f"{name}.{child}")))
        else:
            hooks.append(block.register_forward_hook(partial(count, name)))
            block.inverse = _counting(partial(count, name), block.inverse)  # type: ignore[assignment, arg-type]
    yield
    for hook in hooks:
        hook.remove()


def _counting(count: Callable[[], None], function: Callable[..., Any]) -> Callable[..., Any]:
    def counted(*arguments: Any, **context: Any) -> Any:
        count()
        return function(*arguments, **context)

    return counted
