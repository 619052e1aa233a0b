"""One training step with the engine and one under standard autograd, on copies of a network."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
from revflow._verify.inspection import Inspection, Worst, named_blocks, seeded, sequences_in
from revflow._verify.verification import Both, Verification
from revflow.memory import measure_memory

_Gradients = dict[str, Tensor | None]

_TRIES = 8
"""Number of times that inputs and parameters are perturbed by rounding errors. A single perturbation may miss every kink."""

_WAYS = (nullcontext, ordinary_autograd)
"""With the engine, and under standard autograd."""


class Trial:
    """Compares training steps with the engine and under standard autograd, and collects the problems and notes."""

    def __init__(self, net: nn.Module, inputs: tuple[Any, ...], context: dict[str, Any]) -> None:
        self._net, self._arguments = net, (inputs, context)
        tensors = [t for t in pytree.tree_leaves(self._arguments) if isinstance(t, Tensor)]
        self._device = next((t.device for t in (*tensors, *net.parameters())), torch.device("cpu"))
        self._tolerance = _tolerance([*tensors, *net.parameters()])
        self._problems: list[str] = []
        self._notes: list[str] = []

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
        failed = gradients is None
        kept, peak = (None, None) if failed or self._device.type not in ("cpu", "cuda") else self._memory()
        return Verification(
            gradients=gradients or Worst(float("inf"), "there are none"),
            reconstruction=reconstruction,
            evaluations=evaluations,
            kept=kept,
            peak=peak,
            time=None if failed else self._time(),
            problems=tuple(self._problems),
            notes=tuple(self._notes),
        )

    def _copy(self) -> nn.Module:
        """The network without guards. If it has a memory budget, the costs of its blocks have been measured."""
        net = _unguarded(copied(self._net))
        if any(sequence.memory_budget not in ("min", "max") for sequence in sequences_in(net)):
            (inputs, context), _ = _with_leaves(self._arguments)
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
            plain = self._gradients(copied(self._net))
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
        worst = _worst(engine, plain)
        if worst.error > 10 * self._tolerance.warn:
            self._explain(worst, plain, reconstruction)
        return worst

    def _explain(self, worst: Worst, plain: _Gradients, reconstruction: Worst) -> None:
        """Report a gradient's error: as a note if rounding explains it, and as a problem otherwise.

        The gradient of an activation with a kink, such as ReLU, may depend on the last bit of its input. The error is then no
        larger than the change of standard autograd's own gradients under rounding errors.
        """
        if worst.error == float("inf"):
            self._problems.append(f"the gradient of {worst.where} is not finite, or that of standard autograd is not")
            return
        moved = max(_worst(self._rounded(seed), plain) for seed in range(_TRIES))
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

    def _rounded(self, seed: int) -> _Gradients:
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

    def _gradients(self, net: nn.Module, moved: Callable[[Tensor], Tensor] | None = None) -> _Gradients:
        """By name: the gradients of the arguments, then of the parameters. `moved` changes their values first."""
        (inputs, context), leaves = _with_leaves(self._arguments)
        if moved is not None:
            with torch.no_grad():
                for tensor in (*leaves, *net.parameters()):
                    tensor.copy_(moved(tensor))
        wanted = {f"argument {i}": leaf for i, leaf in enumerate(leaves)}
        wanted |= {name: p for name, p in net.named_parameters() if p.requires_grad}
        torch.manual_seed(0)
        loss = _loss(net(*inputs, **context))
        found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
        return dict(zip(wanted, found, strict=True))

    def _memory(self) -> tuple[Both, Both]:
        """Bytes alive after a forward pass, and the peak of a forward and a backward pass."""
        kept, peak = [], []
        for way in _WAYS:
            net = self._copy()
            (inputs, context), _ = _with_leaves(self._arguments)
            with seeded(self._device), way():
                forward = measure_memory(partial(net, *inputs, **context), device=self._device)
                step = measure_memory(partial(self._step, net), device=self._device)
            kept.append(forward.kept)
            peak.append(step.peak)
        return Both(*kept), Both(*peak)

    def _step(self, net: nn.Module) -> None:
        (inputs, context), leaves = _with_leaves(self._arguments)
        parameters = [p for p in net.parameters() if p.requires_grad]
        torch.autograd.grad(_loss(net(*inputs, **context)), [*leaves, *parameters], allow_unused=True)

    def _time(self) -> float:
        """The time of a step relative to standard autograd: the median of three pairs, after a pair that warms up."""
        net = self._copy()
        with seeded(self._device):
            pairs = [[self._seconds(net, way) for way in _WAYS] for _ in range(4)]
        return statistics.median(engine / plain for engine, plain in pairs[1:])

    def _seconds(self, net: nn.Module, way: Callable[[], AbstractContextManager[None]]) -> float:
        begin = time.perf_counter()
        with way():
            self._step(net)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - begin


def _worst(found: _Gradients, expected: _Gradients) -> Worst:
    """The largest relative error among the gradients that both have."""
    norms = {name: g.double().norm().item() for name, g in expected.items() if g is not None}
    floor = 1e-3 * max(norms.values(), default=0.0) or 1.0
    worst = Worst(0.0, "all equal")
    for name, e in expected.items():
        f = found[name]
        if f is not None and e is not None:
            difference = (f.double() - e.double()).norm().item()
            error = difference / max(norms[name], floor) if difference == difference else float("inf")
            worst = max(worst, Worst(error, name))
    return worst


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


def _with_leaves(arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[Any, list[Tensor]]:
    """Copies of the arguments, and the new leaves among them: one for each floating-point tensor."""
    values, spec = pytree.tree_flatten(arguments)
    values = [
        v.detach().clone().requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else copied(v)
        for v in values  # Each run gets its own copy of an object, because the network may change it.
    ]
    leaves = [v for v in values if isinstance(v, Tensor) and v.requires_grad]
    return pytree.tree_unflatten(values, spec), leaves


def _loss(output: object) -> Tensor:
    """The sum of all outputs, each value with a different weight."""
    total = torch.zeros(())
    for tensor in pytree.tree_leaves(output):
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            weights = torch.arange(tensor.numel(), device=tensor.device).add(1).double().cos().view(tensor.shape)
            total = total.to(tensor.device) + (tensor * weights.to(tensor.dtype)).sum()
    if not total.requires_grad:
        raise ValueError(
            "net returns no tensor that depends on a parameter or on a floating-point input, so that there is no gradient to "
            "compare: let it return one"
        )
    return total


def _tolerance(tensors: list[Tensor]) -> Tolerance:
    """The tolerance for the lowest precision in use."""
    dtypes = {t.dtype for t in tensors if t.is_floating_point()}
    cuda = any(t.is_cuda for t in tensors)
    if is_any_autocast() or (cuda and tf32()) or not dtypes <= TOLERANCES.keys():
        return LOW_PRECISION
    return TOLERANCES[torch.float32 if torch.float32 in dtypes else torch.float64]
