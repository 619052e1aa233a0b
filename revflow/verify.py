"""verify: run a network both ways, and say in plain words whether the engine can be trusted with it."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from revflow._guard import LOW_PRECISION, TOLERANCES, Guard, Tolerance, tf32
from revflow._mode import ordinary_autograd
from revflow._passage import Stepwise
from revflow._replay import undisturbed
from revflow.exact import Grid
from revflow.memory import measure_memory
from revflow.sequence import ReversibleSequence


class Worst(NamedTuple):
    """The largest of several relative errors, and where it was found."""

    error: float
    where: str


class Both(NamedTuple):
    """Bytes with the engine, and under ordinary autograd."""

    engine: int
    plain: int


@dataclass(frozen=True)
class Verification:
    """What `verify` found. `print` it."""

    gradients: Worst
    """Of inputs and parameters, against ordinary autograd: relative to the tensor's norm (or 1e-3 of the largest one's)."""
    reconstruction: Worst
    """Of each block's input from its output, relative to the largest stream; in exact arithmetic any is a problem."""
    evaluations: dict[str, int]
    """How often each conditioner, or block that is no coupling, ran in one training step, its inverse included."""
    kept: Both | None
    """Alive after the forward pass; None where the device counts no bytes."""
    peak: Both | None
    """The most that was alive in the forward and backward pass, beyond what was there before."""
    time: float | None
    """Of a forward and backward pass, in units of ordinary autograd's; None where it fails."""
    problems: tuple[str, ...]
    """What is wrong, in plain words."""
    notes: tuple[str, ...]
    """What is worth knowing and not wrong."""

    @property
    def ok(self) -> bool:
        """Whether no problem was found."""
        return not self.problems

    def __str__(self) -> str:
        counts = sorted(set(self.evaluations.values()))
        lines = [
            f"gradients        {self.gradients.error:.1e} from ordinary autograd's at worst ({self.gradients.where})",
            f"reconstruction   {self.reconstruction.error:.1e} of the largest stream at worst ({self.reconstruction.where})",
            f"evaluations      {' or '.join(map(str, counts))} a training step",
        ]
        for name, both in (("after forward", self.kept), ("at most", self.peak)):
            if both is not None:
                lines.append(f"{name:15s}  {_bytes(both.engine)}; {_bytes(both.plain)} under ordinary autograd")
        if self.time is not None:
            lines.append(f"time             {self.time:.2f} times ordinary autograd's")
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"PROBLEM: {problem}" for problem in self.problems] or ["no problem found"]
        return "\n".join(lines)


def verify(net: nn.Module, *inputs: Any, **context: Any) -> Verification:
    """Run `net(*inputs, **context)` with the engine and under ordinary autograd, and compare.

    Args:
        net: a `ReversibleSequence`, or a module that has some inside. It is left as it was: everything runs on copies.
        *inputs: its arguments. Floating-point tensors among them get gradients, too.
        **context: its keyword arguments, as well. The autocast context in which `verify` is called counts.

    Raises ValueError where there is no ReversibleSequence in `net`. What the network itself raises is raised here too,
    except in the backward pass, where it is reported as a problem.
    """
    if not _sequences(net):
        raise ValueError(
            f"verify takes a module with a ReversibleSequence in it; there is none in this {type(net).__name__}"
        )
    return _Trial(net, inputs, context).report()


_WAYS = (nullcontext, ordinary_autograd)
"""With the engine, and without."""


class _Trial:
    def __init__(self, net: nn.Module, inputs: tuple[Any, ...], context: dict[str, Any]) -> None:
        self._net, self._arguments = net, (inputs, context)
        tensors = [t for t in pytree.tree_leaves(self._arguments) if isinstance(t, Tensor)]
        self._device = next((t.device for t in (*tensors, *net.parameters())), torch.device("cpu"))
        self._tolerance = _tolerance([*tensors, *net.parameters()])
        self._problems: list[str] = []
        self._notes: list[str] = []
        self._with_buffers: list[str] = []
        """What each block does that changes its buffers."""

    def report(self) -> Verification:
        reconstruction = self._look_at_blocks()
        evaluations: dict[str, int] = {}
        with _seeded(self._device):
            gradients = self._compare_gradients(evaluations)
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
        net = _unguarded(copy.deepcopy(self._net))
        if any(sequence.memory_budget not in ("all", "none") for sequence in _sequences(net)):
            (inputs, context), _ = _with_leaves(self._arguments)
            with undisturbed(net, self._device):
                net(*inputs, **context)
        return net

    def _leave_out_chunks(self, net: nn.Module) -> None:
        for sequence in _sequences(net):
            if sequence.chunks > 1:
                self._notes.append("gradients are compared without chunks, which draw random numbers in another order")
                sequence.chunks = 1

    def _compare_gradients(self, evaluations: dict[str, int]) -> Worst | None:
        with ordinary_autograd():
            plain = self._gradients(copy.deepcopy(self._net))
        net = self._copy()
        self._leave_out_chunks(net)
        with _counted(net, evaluations):
            try:
                engine = self._gradients(net)
            except RuntimeError as failure:
                self._problems.append(f"the backward pass fails: {failure}")
                return None
        norms = {name: g.double().norm().item() for name, g in plain.items() if g is not None}
        floor = 1e-3 * max(norms.values(), default=0.0) or 1.0
        worst = Worst(0.0, "all alike")
        for name, expected in plain.items():
            found = engine[name]
            if (found is None) != (expected is None):
                self._problems.append(
                    f"{name} gets {'no' if found is None else 'a'} gradient; ordinary autograd gives "
                    f"{'one' if found is None else 'none'}"
                )
            elif found is not None and expected is not None:
                difference = (found.double() - expected.double()).norm().item()
                error = difference / max(norms[name], floor) if difference == difference else float("inf")
                worst = max(worst, Worst(error, name))
        if worst.error > 10 * self._tolerance.warn:
            self._problems.append(f"the gradient of {worst.where} is off by {worst.error:.1e}")
        return worst

    def _gradients(self, net: nn.Module) -> dict[str, Tensor | None]:
        """By name: those of the arguments, then those of the parameters."""
        (inputs, context), leaves = _with_leaves(self._arguments)
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
            with _seeded(self._device), way():
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
        with _seeded(self._device):
            pairs = [[self._seconds(net, way) for way in _WAYS] for _ in range(4)]
        return statistics.median(engine / plain for engine, plain in pairs[1:])

    def _seconds(self, net: nn.Module, way: Callable[[], AbstractContextManager[None]]) -> float:
        begin = time.perf_counter()
        with way():
            self._step(net)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - begin

    def _look_at_blocks(self) -> Worst:
        """Look at each block by itself, with the streams that it is given in the network; returns the worst inverse."""
        net = copy.deepcopy(self._net)  # without gradients, so under ordinary autograd
        calls: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}

        def keep(block: nn.Module, streams: tuple[Any, ...], context: dict[str, Any]) -> None:
            calls.setdefault(block, (streams, context))

        hooks = [block.register_forward_pre_hook(keep, with_kwargs=True) for _, block, _ in _named_blocks(net)]
        inputs, context = self._arguments
        found: list[Worst] = []
        with _seeded(self._device), torch.no_grad():
            net(*inputs, **context)
            for hook in hooks:
                hook.remove()
            for name, block, grid in _named_blocks(net):
                call = calls.pop(block, None)
                if call is not None and self._is_deterministic(name, block, *call):
                    found.append(self._look_at_inverse(name, block, grid, *call))
        if self._with_buffers:
            first, others = self._with_buffers[0], len(self._with_buffers) - 1
            and_others = f", as do{'es' * (others == 1)} {others} other block{'s' * (others > 1)}" if others else ""
            self._notes.append(f"{first}{and_others}; the engine lets it happen once a step")
        return max(found, default=Worst(0.0, "no block was compared"))

    def _is_deterministic(self, name: str, block: nn.Module, streams: tuple[Any, ...], context: dict[str, Any]) -> bool:
        """Evaluate twice with the same random numbers and buffers, as the engine does."""
        buffers = {key: b.clone() for key, b in block.named_buffers()}
        attributes = _tensor_attributes(block)
        results = []
        for _ in range(2):
            torch.manual_seed(0)
            results.append(block(*streams, **context))
            changed = [key for key, b in block.named_buffers() if not torch.equal(b, buffers[key])]
            for key, b in block.named_buffers():
                b.copy_(buffers[key])
        if changed:
            self._with_buffers.append(f"{name} changes its buffers ({', '.join(changed)})")
        same = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        if not same:
            moved = [key for key, value in _tensor_attributes(block).items() if not torch.equal(value, attributes[key])]
            cause = (
                f"it changes its own {', '.join(moved)}, which is no buffer: register_buffer makes it one"
                if moved
                else "random numbers that are not torch's, or state outside of its parameters and buffers"
            )
            self._problems.append(f"{name} is not deterministic, given the same random numbers of torch: {cause}")
        return same

    def _look_at_inverse(
        self, name: str, block: nn.Module, grid: Grid | None, streams: tuple[Any, ...], context: dict[str, Any]
    ) -> Worst:
        """In eval mode: dropout in the inverse draws in another order."""
        modes = {m: m.training for m in block.modules()}
        block.eval()
        if grid is None:
            rebuilt = block.inverse(*block(*streams, **context), **context)  # type: ignore[operator]
        else:
            alone = ReversibleSequence([block], exact=grid)
            rebuilt = alone.inverse_with_residuals(*alone.forward_with_residuals(streams, **context), **context)
        for module, mode in modes.items():
            module.training = mode
        scale = max((s.abs().max().item() for s in streams if s.numel()), default=0.0) or 1.0
        error = 0.0
        for found, expected in zip(rebuilt, streams, strict=True):
            if found.shape != expected.shape:
                self._problems.append(f"the inverse of {name} returns {tuple(found.shape)} for {tuple(expected.shape)}")
            elif found.numel():
                difference = (found - expected).abs().max().item()
                error = max(error, difference / scale if difference == difference else float("inf"))
        if grid is not None:
            limit = 0.0
        elif isinstance(block, Stepwise) and block.ill_conditioned:  # the engine does not use this inverse
            limit = self._tolerance.error
        else:
            limit = self._tolerance.warn
        if error > limit:
            self._problems.append(f"the inverse of {name} does not undo its forward: it is off by {error:.1e}")
        return Worst(error, name)


def _bytes(count: int) -> str:
    unit, name = (2**30, "GiB") if count >= 2**30 else (2**20, "MiB") if count >= 2**20 else (2**10, "KiB")
    return f"{count / unit:.1f} {name}"


def _sequences(net: nn.Module) -> list[ReversibleSequence]:
    return [m for m in net.modules() if isinstance(m, ReversibleSequence)]


def _named_blocks(net: nn.Module) -> Iterator[tuple[str, nn.Module, Grid | None]]:
    """(name, block, the grid of its sequence)."""
    for name, sequence in net.named_modules():
        if isinstance(sequence, ReversibleSequence):
            for index, block in enumerate(sequence):
                yield f"block {name + '.' if name else ''}{index} ({type(block).__name__})", block, sequence._grid


def _unguarded(net: nn.Module) -> nn.Module:
    for sequence in _sequences(net):
        sequence._guard = Guard("off")
    return net


@contextmanager
def _counted(net: nn.Module, counts: dict[str, int]) -> Iterator[None]:
    """Count evaluations: of a coupling's conditioners, and of other blocks with their inverse."""

    def count(name: str, *_: object) -> None:
        counts[name] = counts.get(name, 0) + 1

    hooks = []
    for name, block, _ in _named_blocks(net):
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


@contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """The same random numbers each time, and the user's own untouched."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


def _with_leaves(arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[Any, list[Tensor]]:
    """The arguments with new leaves for their floating-point tensors."""
    values, spec = pytree.tree_flatten(arguments)
    values = [
        v.detach().clone().requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v for v in values
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


def _tensor_attributes(block: nn.Module) -> dict[str, Tensor]:
    """Tensors that are neither parameters nor buffers, copied."""
    return {
        f"{name}.{key}" if name else key: value.detach().clone()
        for name, module in block.named_modules()
        for key, value in module.__dict__.items()
        if isinstance(value, Tensor)
    }


def _tolerance(tensors: list[Tensor]) -> Tolerance:
    dtypes = {t.dtype for t in tensors if t.is_floating_point()}
    cuda = any(t.is_cuda for t in tensors)
    if torch._C._is_any_autocast_enabled() or (cuda and tf32()) or not dtypes <= TOLERANCES.keys():
        return LOW_PRECISION
    return TOLERANCES[torch.float32 if torch.float32 in dtypes else torch.float64]
