"""Each block of a network by itself: does it return the same twice, does its inverse undo its forward, and is a coupling's
log-derivative that of what it computes?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from revflow._base.stepwise import Stepwise
from revflow._base.streams import Context, Streams
from revflow._guard.tolerance import Tolerance
from revflow._replay.attributes import STATE_IN_CONTEXT, Reachable
from revflow._replay.holders import contents, copied, refill
from revflow.exact import Grid
from revflow.sequence import ReversibleSequence


class Worst(NamedTuple):
    """The largest of several relative errors, and where it was found."""

    error: float
    where: str


class Inspection:
    """Looks at the blocks of a network, and gathers what is to be said of them."""

    def __init__(self, device: torch.device, tolerance: Tolerance) -> None:
        self._device, self._tolerance = device, tolerance
        self.problems: list[str] = []
        self.notes: list[str] = []
        self._with_buffers: list[str] = []
        """What each block does that changes its buffers."""

    def look(self, net: nn.Module, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> Worst:
        """Look at each block with the streams that it is given in the network; returns the worst inverse."""
        net = copied(net)  # without gradients, so under ordinary autograd
        calls: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}

        def keep(block: nn.Module, streams: tuple[Any, ...], context: dict[str, Any]) -> None:
            calls.setdefault(block, (streams, copied(context)))

        hooks = [block.register_forward_pre_hook(keep, with_kwargs=True) for _, block, _ in named_blocks(net)]
        inputs, context = arguments
        found: list[Worst] = []
        with seeded(self._device), torch.no_grad():
            inputs, context = copied((inputs, context))
            net(*inputs, **context)
            for hook in hooks:
                hook.remove()
            first_streams = {block: streams for block, (streams, _) in calls.items()}
            for name, block, grid in named_blocks(net):
                call = calls.pop(block, None)
                if call is not None and self._is_deterministic(name, block, *call):
                    found.append(self._look_at_inverse(name, block, grid, *call))
                    if isinstance(block, Stepwise):
                        self._look_at_log_derivative(name, block, *call)
            self._note_depth(net, first_streams)
        if self._with_buffers:
            first, others = self._with_buffers[0], len(self._with_buffers) - 1
            and_others = f", as do{'es' * (others == 1)} {others} other block{'s' * (others > 1)}" if others else ""
            self.notes.append(f"{first}{and_others}; the engine lets it happen once a step")
        return max(found, default=Worst(0.0, "no block was compared"))

    def _note_depth(self, net: nn.Module, given: dict[nn.Module, Streams]) -> None:
        """Say if a sequence is so deep, or its streams grow so much, that exact arithmetic is advisable.

        `given`: the streams that each block was given.
        """
        for sequence in sequences_in(net):
            blocks = [block for block in sequence if block in given]
            if sequence.exact or not blocks or given[blocks[0]][0].dtype == torch.float64:
                continue
            first, last = (max(_largest(s) for s in given[block]) for block in (blocks[0], blocks[-1]))
            growth = last / first if first else 0.0
            if len(blocks) > _DEEP or growth > _GROWN:
                self.notes.append(
                    f"{len(blocks)} blocks, through which the streams grow {growth:,.1f}-fold: from {_DEEP} blocks on, or from a "
                    f"growth of {_GROWN:.0f}, rounding may put single values on the other side of a ReLU's kink, and change a "
                    f"tensor's gradient by some percent without a warning. exact=True does not round"
                )

    def _is_deterministic(self, name: str, block: nn.Module, streams: tuple[Any, ...], context: dict[str, Any]) -> bool:
        """Evaluate twice with the same random numbers and buffers, as the engine does."""
        buffers = {key: b.clone() for key, b in block.named_buffers()}
        attributes, values = [(m, contents(m)) for m in block.modules()], _tensor_attributes(block)
        results = []
        for _ in range(2):
            torch.manual_seed(0)
            given = copied(context)
            reachable = Reachable(given)
            results.append(block(*streams, **given))
            rebound = [
                key for key, (own, _) in _tensor_attributes(block).items() if own is not values.get(key, (None,))[0]
            ]
            for module, held in attributes:
                refill(module, held)
            place = reachable.changed()
            if place is not None:
                self.problems.append(f"{name} changes {place}: {STATE_IN_CONTEXT}")
                return False
            changed = [key for key, b in block.named_buffers() if not torch.equal(b, buffers[key])]
            for key, b in block.named_buffers():
                b.copy_(buffers[key])
        if changed:
            self._with_buffers.append(f"{name} changes its buffers ({', '.join(changed)})")
        if rebound:
            self._with_buffers.append(f"{name} changes its own {', '.join(rebound)}")
        if not all(torch.isfinite(s).all() for s in results[0]):
            self.problems.append(f"{name} returns values that are not finite")
            return False
        same = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        if not same:
            moved = [key for key, (own, value) in values.items() if not torch.equal(own, value)]
            cause = (
                f"it changes its own {', '.join(moved)} in place, which is not a buffer: register_buffer makes it one"
                if moved
                else "random numbers that are not torch's, or state outside of its parameters and buffers"
            )
            self.problems.append(f"{name} is not deterministic, given the same random numbers of torch: {cause}")
        return same

    def _look_at_inverse(
        self, name: str, block: nn.Module, grid: Grid | None, streams: tuple[Any, ...], context: dict[str, Any]
    ) -> Worst:
        """In eval mode: dropout in the inverse draws in another order."""
        modes = {m: m.training for m in block.modules()}
        block.eval()
        attributes = [(m, contents(m)) for m in block.modules()]
        if grid is None:
            outputs: tuple[Any, ...] = block(*streams, **context)
            undo: Callable[..., Streams] = block.inverse  # type: ignore[assignment]
        else:
            alone = ReversibleSequence([block], exact=grid)
            outputs = alone.forward_with_residuals(streams, **context)
            undo = alone.inverse_with_residuals
        for module, held in attributes:
            refill(module, held)
        rebuilt = undo(*outputs, **context)
        for module, mode in modes.items():
            module.training = mode
        scale = max((s.abs().max().item() for s in streams if s.numel()), default=0.0) or 1.0
        error = 0.0
        if len(rebuilt) != len(streams):
            self.problems.append(
                f"the inverse of {name} returns {len(rebuilt)} where forward was given {len(streams)} streams"
            )
            return Worst(float("inf"), name)
        for found, expected in zip(rebuilt, streams, strict=True):
            if found.shape != expected.shape:
                self.problems.append(f"the inverse of {name} returns {tuple(found.shape)} for {tuple(expected.shape)}")
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
            self.problems.append(f"the inverse of {name} does not undo its forward: it is off by {error:.1e}")
        return Worst(error, name)

    def _look_at_log_derivative(self, name: str, block: Stepwise, streams: Streams, context: Context) -> None:
        """Where the coupling has one, against the derivative of `combine`."""
        k, conditioner = block.conditioners(streams)[0]
        if not (streams[k].numel() and streams[k].is_floating_point()):
            return
        t = block.evaluate(conditioner, streams[k], streams[:k] + streams[k + 1 :], context)
        try:
            told = block.log_derivative(streams[k], *t).exp()
        except NotImplementedError:
            return
        if told.shape != streams[k].shape:
            self.problems.append(f"log_derivative of {name} returns {tuple(told.shape)} for {tuple(streams[k].shape)}")
            return
        with torch.enable_grad():
            x = streams[k].detach().requires_grad_()
            (derivative,) = torch.autograd.grad(block.combine(x, *t).sum(), x)
        error = ((told - derivative.abs()).abs().max() / derivative.abs().max()).item()
        if not error <= 10 * self._tolerance.warn:
            self.problems.append(
                f"log_derivative of {name} is not that of its combine: its exponential is off by {error:.1e}"
            )


_DEEP, _GROWN = 100, 30.0


def _largest(stream: Tensor) -> float:
    return stream.abs().max().item() if stream.numel() else 0.0


def sequences_in(net: nn.Module) -> list[ReversibleSequence]:
    return [m for m in net.modules() if isinstance(m, ReversibleSequence)]


def named_blocks(net: nn.Module) -> Iterator[tuple[str, nn.Module, Grid | None]]:
    """(name, block, the grid of its sequence)."""
    for name, sequence in net.named_modules():
        if isinstance(sequence, ReversibleSequence):
            for index, block in enumerate(sequence):
                yield (
                    f"block {name + '.' if name else ''}{index} ({type(block).__name__})",
                    block,
                    sequence.exact or None,
                )


@contextmanager
def seeded(device: torch.device) -> Iterator[None]:
    """The same random numbers each time, and the user's own untouched."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


def _tensor_attributes(block: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Tensors that are neither parameters nor buffers, with copies of their values."""
    return {
        f"{name}.{key}" if name else key: (value, value.detach().clone())
        for name, module in block.named_modules()
        for key, value in module.__dict__.items()
        if isinstance(value, Tensor)
    }
