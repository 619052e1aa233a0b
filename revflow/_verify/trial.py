"""One training step with the engine, one under ordinary autograd, on copies of a network."""

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
"""How often inputs and parameters are moved by rounding errors: one error alone may meet no kink."""

_WAYS = (nullcontext, ordinary_autograd)
"""With the engine, and without."""


class Trial:
    def __init__(self, net: nn.Module, inputs: tuple[Any, ...], context: dict[str, Any]) -> None:
        self._net, self._arguments = net, (inputs, context)
        tensors = [t for t in pytree.tree_leaves(self._arguments) if isinstance(t, Tensor)]
        self._device = next((t.device for t in (*tensors, *net.parameters())), torch.device("cpu"))
        self._tolerance = _tolerance([*tensors, *net.parameters()])
        self._problems: list[str] = []
        self._notes: list[str] = []

    def report(self) -> Verification:
        blocks = Inspection(self._device, self._tolerance)
        reconstruction = blocks.look(self._net, self._arguments)
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
        """The network without guards. Where it has a memory budget it has measured what that leaves to be rebuilt."""
        net = _unguarded(copied(self._net))
        if any(sequence.memory_budget not in ("all", "none") for sequence in sequences_in(net)):
            (inputs, context), _ = _with_leaves(self._arguments)
            with undisturbed(net, self._device):
                net(*inputs, **context)
        return net

    def _leave_out_chunks(self, net: nn.Module) -> None:
        for sequence in sequences_in(net):
            if sequence.chunks > 1:
                self._notes.append("gradients are compared without chunks, which draw random numbers in another order")
                sequence.chunks = 1

    def _compare_gradients(self, evaluations: dict[str, int], reconstruction: Worst) -> Worst | None:
        with ordinary_autograd():
            plain = self._gradients(copied(self._net))
        net = self._copy()
        self._leave_out_chunks(net)
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
                    f"{name} gets {'no' if found is None else 'a'} gradient; ordinary autograd gives "
                    f"{'one' if found is None else 'none'}"
                )
        worst = _worst(engine, plain)
        if worst.error > 10 * self._tolerance.warn:
            self._explain(worst, plain, reconstruction)
        return worst

    def _explain(self, worst: Worst, plain: _Gradients, reconstruction: Worst) -> None:
        """A gradient that is off: by no more than ordinary autograd's own move with rounding errors, or a problem.

        Where an activation has a kink, as ReLU does, the last bit of its input may decide on a gradient.
        """
        if worst.error == float("inf"):
            self._problems.append(f"the gradient of {worst.where} is not finite, or ordinary autograd's is not")
            return
        moved = max(_worst(self._rounded(seed), plain) for seed in range(_TRIES))
        off = f"the gradient of {worst.where} is off by {worst.error:.1e}"
        own = f"ordinary autograd's own move by up to {moved.error:.1e} where inputs and parameters move by a rounding error"
        if worst.error <= 3 * moved.error < float("inf") and reconstruction.error <= self._tolerance.warn / 10:
            self._notes.append(
                f"{off}, and {own}: activations with a kink, such as ReLU, do that. In float64 it vanishes"
            )
        else:
            self._problems.append(
                f"{off}; {own}. Repeat with the network and its inputs in float64: what vanishes there is rounding, and "
                f"exact=True has none"
            )

    def _rounded(self, seed: int) -> _Gradients:
        """Ordinary autograd's gradients, where each value of the inputs and parameters is moved by a rounding error."""
        net = copied(self._net)
        generator = torch.Generator().manual_seed(seed)
        with ordinary_autograd():
            return self._gradients(net, lambda tensor: _moved(tensor, generator))

    def _train_with_guards(self) -> None:
        """Let the guards see a training step, as they would: what they refuse is a problem."""
        net = copied(self._net)
        for sequence in sequences_in(net):  # with new ones, which look at each block
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
        """By name: those of the arguments, then those of the parameters."""
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
        """Alive after a forward pass, and at most in a forward and a backward pass."""
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
        """Median of three pairs, after one of each."""
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
    """The largest relative error of those gradients that both have."""
    norms = {name: g.double().norm().item() for name, g in expected.items() if g is not None}
    floor = 1e-3 * max(norms.values(), default=0.0) or 1.0
    worst = Worst(0.0, "all alike")
    for name, e in expected.items():
        f = found[name]
        if f is not None and e is not None:
            difference = (f.double() - e.double()).norm().item()
            error = difference / max(norms[name], floor) if difference == difference else float("inf")
            worst = max(worst, Worst(error, name))
    return worst


def _moved(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Each value larger or smaller by a rounding error."""
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
    """Count evaluations: of a coupling's conditioners, and of other blocks with their inverse."""

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
    """The arguments with new leaves for their floating-point tensors."""
    values, spec = pytree.tree_flatten(arguments)
    values = [
        v.detach().clone().requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else copied(v)
        for v in values  # of an object each run gets its own, since it may be filled
    ]
    leaves = [v for v in values if isinstance(v, Tensor) and v.requires_grad]
    return pytree.tree_unflatten(values, spec), leaves


def _loss(output: object) -> Tensor:
    """A sum in which every value of the output has another weight."""
    total = torch.zeros(())
    for tensor in pytree.tree_leaves(output):
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            weights = torch.arange(tensor.numel(), device=tensor.device).add(1).double().cos().view(tensor.shape)
            total = total.to(tensor.device) + (tensor * weights.to(tensor.dtype)).sum()
    if not total.requires_grad:
        raise ValueError("nothing in what the network returns depends on a tensor that takes a gradient")
    return total


def _tolerance(tensors: list[Tensor]) -> Tolerance:
    dtypes = {t.dtype for t in tensors if t.is_floating_point()}
    cuda = any(t.is_cuda for t in tensors)
    if is_any_autocast() or (cuda and tf32()) or not dtypes <= TOLERANCES.keys():
        return LOW_PRECISION
    return TOLERANCES[torch.float32 if torch.float32 in dtypes else torch.float64]
