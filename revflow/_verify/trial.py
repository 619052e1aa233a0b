"""One training step with the engine, one under standard autograd and one with checkpointing, on copies of a network."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from revflow._base.stepwise import Stepwise
from revflow._base.torch_private import is_any_autocast, pytree
from revflow._guard.policy import Guard, ReconstructionWarning
from revflow._guard.precision import tf32
from revflow._guard.tolerance import LOW_PRECISION, TOLERANCES, Tolerance
from revflow._replay.holders import copied
from revflow._replay.mode import ordinary_autograd
from revflow._replay.undisturbed import undisturbed
from revflow._verify.checkpointing import Checkpointing
from revflow._verify.costs import Costs, Measured
from revflow._verify.inspection import Inspection, Worst, named_blocks, seeded, sequences_in
from revflow._verify.step import Gradients, loss_of, with_leaves, worst_of
from revflow._verify.verification import Verification
from revflow.recurrence import ReversibleRecurrence
from revflow.sequence import ReversibleSequence

_TRIES = 8
"""Number of times that inputs and parameters are perturbed by rounding errors. A single perturbation may miss every kink."""


class Trial:
    """Compares training steps with the engine and under standard autograd, and collects the problems and notes."""

    def __init__(self, net: nn.Module, inputs: tuple[Any, ...], context: dict[str, Any]) -> None:
        self._net, self._arguments = net, (inputs, context)
        tensors = [t for t in pytree.tree_leaves(self._arguments) if isinstance(t, Tensor)]
        self._device = next((t.device for t in (*tensors, *net.parameters())), torch.device("cpu"))
        self._tolerance = _tolerance([*tensors, *net.parameters()])
        self._problems: list[str] = []
        self._notes: list[str] = []
        self._plain: Gradients = {}
        """Those of standard autograd."""

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
                found = self._gradients(net)
        except Exception as failure:  # of any kind, since the network's own code runs
            first, *_ = str(failure).splitlines() or [type(failure).__name__]
            self._notes.append(f"checkpointing each block fails: {first}")
            return None
        worst = worst_of(found, self._plain)
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
        with ordinary_autograd():
            plain = self._plain = self._gradients(copied(self._net))
        net = self._copy()
        self._set_one_chunk(net)
        with _counted(net, evaluations):
            try:
                engine = self._gradients(net)
            except RuntimeError as failure:
                self._problems.append(f"the backward pass fails: {failure}")
                return None
        for name, expected in plain.items():
            found = engine[name]
            if (found is None) != (expected is None):
                self._problems.append(
                    f"{name} gets {'no' if found is None else 'a'} gradient; standard autograd gives "
                    f"{'one' if found is None else 'none'}"
                )
        worst = worst_of(engine, plain)
        if worst.error > 10 * self._tolerance.warn:
            self._explain(worst, plain, reconstruction)
        return worst

    def _explain(self, worst: Worst, plain: Gradients, reconstruction: Worst) -> None:
        """Report a gradient's error: as a note if rounding explains it, and as a problem otherwise.

        The gradient of an activation with a kink, such as ReLU, may depend on the last bit of its input. The error is then no
        larger than the change of standard autograd's own gradients under rounding errors.
        """
        if worst.error == float("inf"):
            self._problems.append(f"the gradient of {worst.where} is not finite, or that of standard autograd is not")
            return
        moved = max(worst_of(self._rounded(seed), plain) for seed in range(_TRIES))
        off = f"the gradient of {worst.where} is off by {worst.error:.1e}"
        own = (
            f"rounding errors in inputs and parameters change standard autograd's gradients by up to {moved.error:.1e}"
        )
        if worst.error <= 3 * moved.error < float("inf") and reconstruction.error <= self._tolerance.warn / 10:
            self._notes.append(
                f"{off}, but {own}: activations with a kink, such as ReLU, cause that. In float64 it vanishes"
            )
        else:
            self._problems.append(
                f"{off}; {own}. Repeat with the network and its inputs in float64: an error that vanishes there is rounding, "
                f"and exact=True avoids it"
            )

    def _rounded(self, seed: int) -> Gradients:
        """Standard autograd's gradients, with each value of the inputs and parameters changed by a rounding error."""
        net = copied(self._net)
        generator = torch.Generator().manual_seed(seed)
        with ordinary_autograd():
            return self._gradients(net, lambda tensor: _moved(tensor, generator))

    def _train_with_guards(self) -> None:
        """Run a training step with guards; an error that they raise is a problem, a warning a note."""
        net = copied(self._net)
        for sequence in sequences_in(net):  # New guards: used ones no longer check each block closely.
            mode, exact = sequence._guard.mode, sequence._guard.exact
            sequence._guard = Guard("warn" if mode == "off" else mode, exact)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always", ReconstructionWarning)
            try:
                self._gradients(net)
            except RuntimeError as refusal:
                self._problems.append(f"the guard ends the training step: {refusal}")
        self._notes += [f"the guard warns: {w.message}" for w in warned if w.category is ReconstructionWarning]

    def _gradients(self, net: nn.Module, moved: Callable[[Tensor], Tensor] | None = None) -> Gradients:
        """By name: the gradients of the arguments, then of the parameters. `moved` changes their values first."""
        (inputs, context), leaves = with_leaves(self._arguments)
        if moved is not None:
            with torch.no_grad():
                for tensor in (*leaves, *net.parameters()):
                    tensor.copy_(moved(tensor))
        wanted = {f"argument {i}": leaf for i, leaf in enumerate(leaves)}
        wanted |= {name: p for name, p in net.named_parameters() if p.requires_grad}
        torch.manual_seed(0)
        loss = loss_of(net(*inputs, **context))
        found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
        return dict(zip(wanted, found, strict=True))


def _moved(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """The tensor with each value increased or decreased by a rounding error."""
    if not tensor.is_floating_point():
        return tensor
    signs = torch.randint(2, tensor.shape, generator=generator).to(tensor.device, tensor.dtype).mul(2).sub(1)
    return tensor * (1 + torch.finfo(tensor.dtype).eps * signs)


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


def _tolerance(tensors: list[Tensor]) -> Tolerance:
    """The tolerance for the lowest precision in use."""
    dtypes = {t.dtype for t in tensors if t.is_floating_point()}
    cuda = any(t.is_cuda for t in tensors)
    if is_any_autocast() or (cuda and tf32()) or not dtypes <= TOLERANCES.keys():
        return LOW_PRECISION
    return TOLERANCES[torch.float32 if torch.float32 in dtypes else torch.float64]
